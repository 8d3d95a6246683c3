// Preloaded, it counts what a process changes on disk under one folder, and kills it just before a chosen change.
// arm(folder, k): from now on, SIGKILL before the k-th change, counted from 1. changes(): how many there were.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

static char folder[4096];
static int chosen = 0, count = 0;

void arm(const char *where, int k) {
    snprintf(folder, sizeof folder, "%s", where);
    chosen = k;
    count = 0;
}

int changes(void) { return count; }

static void change(void) {
    if (++count == chosen) kill(getpid(), SIGKILL);
}

static int ours(int fd) {
    if (!folder[0]) return 0;
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t size = readlink(link, path, sizeof path - 1);
    if (size < 0) return 0;
    path[size] = 0;
    return strncmp(path, folder, strlen(folder)) == 0;
}

static void at(int dir, const char *path) {
    if (!folder[0]) return;
    if (path[0] == '/' ? strncmp(path, folder, strlen(folder)) == 0 : (dir != AT_FDCWD && ours(dir))) change();
}

#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

ssize_t write(int fd, const void *data, size_t size) {
    if (ours(fd)) change();
    return NEXT(write)(fd, data, size);
}

ssize_t writev(int fd, const struct iovec *parts, int many) {
    if (ours(fd)) change();
    return NEXT(writev)(fd, parts, many);
}

ssize_t pwrite64(int fd, const void *data, size_t size, off64_t where) {
    if (ours(fd)) change();
    return NEXT(pwrite64)(fd, data, size, where);
}

int fsync(int fd) {
    if (ours(fd)) change();
    return NEXT(fsync)(fd);
}

int ftruncate64(int fd, off64_t size) {
    if (ours(fd)) change();
    return NEXT(ftruncate64)(fd, size);
}

int mkdir(const char *path, mode_t mode) {
    at(AT_FDCWD, path);
    return NEXT(mkdir)(path, mode);
}

int rename(const char *from, const char *to) {
    at(AT_FDCWD, to);
    return NEXT(rename)(from, to);
}

int unlink(const char *path) {
    at(AT_FDCWD, path);
    return NEXT(unlink)(path);
}

int unlinkat(int dir, const char *path, int flags) {
    at(dir, path);
    return NEXT(unlinkat)(dir, path, flags);
}

int rmdir(const char *path) {
    at(AT_FDCWD, path);
    return NEXT(rmdir)(path);
}

static int opened(int fd, int flags) {
    if (fd >= 0 && (flags & (O_CREAT | O_TRUNC)) && ours(fd)) change();
    return fd;
}

int open(const char *path, int flags, ...) {
    va_list more;
    va_start(more, flags);
    mode_t mode = va_arg(more, mode_t);
    va_end(more);
    return opened(NEXT(open)(path, flags, mode), flags);
}

int open64(const char *path, int flags, ...) {
    va_list more;
    va_start(more, flags);
    mode_t mode = va_arg(more, mode_t);
    va_end(more);
    return opened(NEXT(open64)(path, flags, mode), flags);
}
