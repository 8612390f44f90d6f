// Uses every kind of operation through a client whose types are generated from the document.
// Run by tests/test_clients.py: node client.js ADDRESS DIRECTORY-TO-MOUNT

import assert from "node:assert/strict";
import createClient from "openapi-fetch";
import type { components, paths } from "./schema.js";

type SandboxInfo = components["schemas"]["SandboxInfo"];
type Problem = components["schemas"]["Problem"];

const [baseUrl = "", hostPath = ""] = process.argv.slice(2);
const client = createClient<paths>({ baseUrl });
const inBox = { params: { path: { ref: "typescript" } } };
const text = "Hello world!";

/** What was answered; a problem ends the program. */
function got<T>(answer: { data?: T; error?: Problem | undefined; response: Response }): T {
  if (answer.data === undefined) throw new Error(JSON.stringify(answer.error));
  return answer.data;
}

async function createsAndLists(): Promise<void> {
  const made: SandboxInfo = got(
    await client.POST("/sandboxes", {
      body: {
        name: "typescript",
        ttl_seconds: 3600,
        env_vars: { GREETING: "hello" },
        open_ports: [8080],
        mounts: [{ host_path: hostPath, sandbox_path: "/project", read_only: true }],
        metadata: { team: ["search"] },
      },
    }),
  );
  assert.match(made.id, /^sb-[0-9a-f]{8}$/);
  assert.equal(made.slug, "typescript");
  assert.ok(Date.parse(made.expires_at ?? "") > Date.parse(made.created_at));

  const found = got(await client.GET("/sandboxes/{ref}", inBox));
  assert.deepEqual([found.id, found.status, found.error_message], [made.id, "running", null]);
  assert.deepEqual(found.metadata, { team: ["search"] });

  const all = got(await client.GET("/sandboxes", { params: { query: { name: "typescript" } } }));
  assert.deepEqual(all.map((one) => one.id), [made.id]);
}

async function executes(): Promise<void> {
  const result = got(
    await client.POST("/sandboxes/{ref}/execute", {
      ...inBox,
      body: { command: "echo $GREETING; cat >&2; exit 3", stdin: "oh", timeout_seconds: 60 },
    }),
  );
  assert.deepEqual(
    [result.stdout, result.stderr, result.exit_code, result.timed_out],
    ["hello\n", "oh", 3, false],
  );
  const page = got(
    await client.GET("/sandboxes/{ref}/logs", {
      params: { ...inBox.params, query: { source: "stdout", limit: 10 } },
    }),
  );
  assert.equal(page.logs.at(-1)?.message, "hello");
  assert.equal(page.total, page.logs.length);
}

async function movesFiles(): Promise<void> {
  const sent = got(
    await client.POST("/sandboxes/{ref}/files", {
      ...inBox,
      body: { mount_path: "/workspace", file_path: "form.txt", file: text },
      bodySerializer: (body) => {
        const form = new FormData();
        for (const [name, value] of Object.entries(body)) {
          form.append(name, name === "file" ? new Blob([value]) : value);
        }
        return form;
      },
    }),
  );
  assert.deepEqual(sent, { status: "created", path: "form.txt", size: text.length });
  const body = { file_path: "json.txt", mount_path: "/workspace", content: btoa(text) };
  got(await client.POST("/sandboxes/{ref}/files/upload", { ...inBox, body }));

  const listing = got(await client.GET("/sandboxes/{ref}/files", inBox));
  assert.deepEqual(
    listing.files.map((file) => [file.name, file.type, file.size]).sort(),
    [["form.txt", "file", 12], ["json.txt", "file", 12]],
  );
  for (const path of ["form.txt", "json.txt"]) {
    const file = { params: { path: { ...inBox.params.path, path } } };
    const back: Blob = got(
      await client.GET("/sandboxes/{ref}/files/{path}", { ...file, parseAs: "blob" }),
    );
    assert.equal(await back.text(), text);
    const gone = await client.DELETE("/sandboxes/{ref}/files/{path}", file);
    assert.equal(gone.response.status, 204);
  }
}

async function mounts(): Promise<void> {
  const added = got(
    await client.POST("/sandboxes/{ref}/mounts", {
      ...inBox,
      body: { host_path: hostPath, sandbox_path: "/more", read_only: false },
    }),
  );
  assert.equal(added.sandbox_path, "/more");
  const all = got(await client.GET("/sandboxes/{ref}/mounts", inBox));
  assert.deepEqual(all.map((mount) => mount.sandbox_path).sort(), ["/more", "/project"]);
  const gone = await client.DELETE("/sandboxes/{ref}/mounts/{sandbox_path}", {
    params: { path: { ...inBox.params.path, sandbox_path: "/more" } },
  });
  assert.equal(gone.response.status, 204);
}

async function livesAndDies(): Promise<void> {
  const changed = got(
    await client.PATCH("/sandboxes/{ref}", { ...inBox, body: { env_vars: {}, ttl_seconds: null } }),
  );
  assert.deepEqual([changed.env_vars, changed.ttl_seconds, changed.expires_at], [{}, null, null]);
  const statuses: string[] = [
    got(await client.POST("/sandboxes/{ref}/stop", inBox)).status,
    got(await client.POST("/sandboxes/{ref}/start", inBox)).status,
    got(await client.POST("/sandboxes/{ref}/restart", inBox)).status,
    got(await client.POST("/sandboxes/{ref}/force-stop", inBox)).status,
  ];
  assert.deepEqual(statuses, ["stopped", "running", "running", "stopped"]);
  const inactive = got(await client.GET("/sandboxes/inactive"));
  assert.ok(inactive.sandboxes.some((one) => one.slug === "typescript"));
  assert.equal((await client.DELETE("/sandboxes/{ref}", inBox)).response.status, 204);
}

async function toldWhatIsWrong(): Promise<void> {
  const lost = await client.GET("/sandboxes/{ref}", inBox);
  assert.equal(lost.error?.type, "urn:heyvm:problem:not-found");
  const wrong = await client.POST("/sandboxes", { body: { open_ports: [0] } });
  assert.deepEqual(Object.keys(wrong.error?.errors ?? {}), ["open_ports.0"]);
}

assert.equal(got(await client.GET("/health")).status, "ok");
assert.ok(got(await client.GET("/capabilities")).supportedDrivers.includes("bubblewrap"));
await createsAndLists();
await executes();
await movesFiles();
await mounts();
await livesAndDies();
await toldWhatIsWrong();
console.log("all is well");
