/* Makes the system calls that it is told, raw, as each kind of program would: one line of input is
 * "64|32|x32 NUMBER ARGUMENT*6", one line of output the result (-errno where it failed).
 * "path" as an argument is the address of a path that can be written. Built with -static -no-pie, so
 * that addresses fit in 32 bits; the 32-bit and x32 forms are made from 64-bit code, which the
 * kernel allows and which needs no second C library. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <sys/wait.h>
#include <unistd.h>

#define X32_BIT 0x40000000L
#define HUNG 12345L

static char path[] = "/tmp/probe";

static long call64(long nr, const long *a)
{
    register long r10 __asm__("r10") = a[3];
    register long r8 __asm__("r8") = a[4];
    register long r9 __asm__("r9") = a[5];
    long result;
    __asm__ volatile("syscall" : "=a"(result)
                     : "a"(nr), "D"(a[0]), "S"(a[1]), "d"(a[2]), "r"(r10), "r"(r8), "r"(r9)
                     : "rcx", "r11", "memory");
    return result;
}

static long call32(long nr, const long *a)
{
    long result;
    __asm__ volatile("push %%rbp\n\tmov %[six], %%rbp\n\tint $0x80\n\tpop %%rbp"
                     : "=a"(result)
                     : "a"(nr), "b"(a[0]), "c"(a[1]), "d"(a[2]), "S"(a[3]), "D"(a[4]),
                       [six] "r"(a[5])
                     : "r8", "r9", "r10", "r11", "memory");
    return (int)result;
}

static long call(const char *form, long nr, const long *a)
{
    if (!strcmp(form, "64"))
        return call64(nr, a);
    if (!strcmp(form, "x32"))
        return call64(nr | X32_BIT, a);
    return call32(nr, a);
}

/* In a child of its own: what succeeds (unshare, say) must not colour the next line. */
static long result_of(const char *form, long nr, const long *a)
{
    int ends[2];
    long result = HUNG;
    if (pipe(ends))
        exit(2);
    pid_t child = fork();
    if (!child) {
        alarm(5);
        result = call(form, nr, a);
        if (write(ends[1], &result, sizeof result) < 0)
            _exit(1);
        _exit(0);
    }
    close(ends[1]);
    if (read(ends[0], &result, sizeof result) < 0)
        exit(2);
    close(ends[0]);
    waitpid(child, NULL, 0);
    unlink(path);
    return result;
}

int main(void)
{
    char form[8], word[6][32];
    long nr, a[6];
    while (scanf("%7s %ld %31s %31s %31s %31s %31s %31s", form, &nr, word[0], word[1], word[2],
                 word[3], word[4], word[5]) == 8) {
        for (int i = 0; i < 6; i++)
            a[i] = strcmp(word[i], "path") ? (long)strtoul(word[i], NULL, 0) : (long)path;
        printf("%ld\n", result_of(form, nr, a));
        fflush(stdout);
    }
    return 0;
}
