"""SSH public keys as a user sends them: the lines of `~/.ssh/id_ed25519.pub`.

For the API, which must not import paramiko, as for the SSH server; standard library only.
"""

from __future__ import annotations

import base64
import binascii

from heyvm.errors import Invalid

MAX_LINE_BYTES = 8192
MIN_RSA_BITS, MAX_RSA_BITS = 2048, 16384
MAX_EXPONENT_BITS = 64  # more is no key that anybody makes, and slow to verify with
ED25519_BYTES = 32
# The point of a curve, uncompressed (SEC 1, 2.3.3): 4, x, y.
POINT_BYTES = {"nistp256": 65, "nistp384": 97, "nistp521": 133}
ECDSA = "ecdsa-sha2-"
KINDS = ("ssh-ed25519", *(ECDSA + curve for curve in POINT_BYTES), "ssh-rsa")


def parse_public_key(line: str) -> bytes:
    """The key of a line `TYPE BASE64 [COMMENT]`, as SSH sends it (RFC 4253, 6.6). `Invalid` says
    what is wrong with it."""
    if len(line.encode("utf-8", "surrogatepass")) > MAX_LINE_BYTES:
        raise Invalid(f"an SSH public key has at most {MAX_LINE_BYTES} bytes")
    if "\0" in line or len(line.strip().splitlines()) != 1:
        raise Invalid("an SSH public key is one line: TYPE BASE64 [COMMENT]")
    words = line.split(None, 2)
    if words[0] not in KINDS:
        raise Invalid(_complaint(words))
    if len(words) < 2:
        raise Invalid(f"the SSH public key has no key after {words[0]!r}")
    blob = _decoded(words[1])
    _demand_well_formed(words[0], blob)
    return blob


def _complaint(words: list[str]) -> str:
    """What to say of a line that does not begin with a kind of key."""
    if words[0].startswith("-----BEGIN"):
        return "this is a private key, or no OpenSSH key: send the line of the .pub file"
    if any(kind in word for word in words[1:] for kind in KINDS):
        return "options before an SSH public key are not supported: send TYPE BASE64 alone"
    return f"{words[0][:64]!r} is no type of SSH public key; there are {', '.join(KINDS)}"


def _decoded(word: str) -> bytes:
    try:
        return base64.b64decode(word, validate=True)
    except (binascii.Error, ValueError):
        raise Invalid("the SSH public key is not base64") from None


def _demand_well_formed(kind: str, blob: bytes) -> None:
    fields = _fields(blob)
    if not fields or fields[0] != kind.encode():
        raise Invalid(f"the SSH public key is not of the type {kind!r} that its line says")
    if kind == "ssh-rsa":
        _demand_rsa(fields[1:])
    elif not _is_point(kind, fields[1:]):
        raise Invalid(f"the SSH public key is no {kind} key")


def _fields(blob: bytes) -> list[bytes]:
    """The strings that it is made of (RFC 4251, 5); none if it is cut short."""
    found, at = list[bytes](), 0
    while at < len(blob):
        size = int.from_bytes(blob[at : at + 4], "big")
        end = at + 4 + size
        if end > len(blob):
            return []
        found.append(blob[at + 4 : end])
        at = end
    return found


def _is_point(kind: str, fields: list[bytes]) -> bool:
    if kind == "ssh-ed25519":
        return [len(field) for field in fields] == [ED25519_BYTES]
    curve = kind.removeprefix(ECDSA)
    if len(fields) != 2 or fields[0] != curve.encode():
        return False
    return len(fields[1]) == POINT_BYTES[curve] and fields[1][0] == 4


def _demand_rsa(fields: list[bytes]) -> None:
    if len(fields) != 2 or not all(field and field[0] < 0x80 for field in fields):
        raise Invalid("the SSH public key is no ssh-rsa key")
    exponent, modulus = (int.from_bytes(field, "big") for field in fields)
    if not MIN_RSA_BITS <= modulus.bit_length() <= MAX_RSA_BITS:
        raise Invalid(
            f"the RSA key has {modulus.bit_length()} bits:"
            f" it takes {MIN_RSA_BITS} to {MAX_RSA_BITS}, better an ed25519 key"
        )
    if exponent < 3 or not exponent & modulus & 1 or exponent.bit_length() > MAX_EXPONENT_BITS:
        raise Invalid("the SSH public key is no ssh-rsa key")
