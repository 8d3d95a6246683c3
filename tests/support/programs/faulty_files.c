// Preloaded, it makes the calls of a process on files below one folder fail as those of a file server do.
//
// FAULTS_BELOW   the folder
// FAULTS         rules, separated by `;`: RANK CALLS PATH KINDS ONE_IN MOST
//                  RANK    the value of the variable RANK, `-` where it is not set, or `*`
//                  CALLS   open (to read), create (to write), read, write, sync, rename, unlink, rmdir, mkdir, stat,
//                          list, readdir, lock, separated by commas, or `*`
//                  PATH    parts of the path below the folder, separated by commas, of which it has one, or with a `!`
//                          in front none; or `*`
//                  KINDS   names of errors; `slow` waits half a second first; `stale` hides the newest entry of a
//                          listing; `kill` kills the process first; `any` is what a call may return on a file server
//                  ONE_IN  one in so many calls, at random
//                  MOST    how many in one process
// FAULTS_SEED    makes others of the calls fail. Which ones depends on rank, call, path and how often the process made
//                that call with that path, but not on the order of threads.
// FAULTS_LOG     a file that gets a line for each fault, with tabs: kind, call, rank, process, path, number of the call
// FAULTS_TRACE   also log what changed the disk, with the kind `done`; the last column is the size of a file that was
//                created or synced, or the path before a rename
//
// Processes that were forked read their own variables, so that a warm process can be configured after the fork.
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#define REAL(name) ({ \
    static __typeof__(&name) real; \
    if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name); \
    real; })
#define SLOW 100000
#define STALE 100001
#define KILL 100002

enum { RULES = 16, KINDS = 12, CALLS = 1 << 14, LISTINGS = 64 };

static const struct { const char *name; int code; } NAMES[] = {
    {"ESTALE", ESTALE}, {"EIO", EIO}, {"ENOSPC", ENOSPC}, {"ENOLCK", ENOLCK}, {"EOPNOTSUPP", EOPNOTSUPP},
    {"EACCES", EACCES}, {"ENOENT", ENOENT}, {"slow", SLOW}, {"stale", STALE}, {"kill", KILL},
};
static const struct { const char *call, *kinds; } ANY[] = {
    {"open", "ESTALE,EIO"}, {"create", "ESTALE,EIO,ENOSPC"}, {"read", "ESTALE,EIO"}, {"write", "EIO,ENOSPC"},
    {"sync", "EIO,ENOSPC"}, {"rename", "ESTALE,EIO,slow"}, {"unlink", "ESTALE,EIO"}, {"rmdir", "ESTALE,EIO"},
    {"mkdir", "ESTALE,EIO,ENOSPC"}, {"stat", "ESTALE,EIO"}, {"list", "ESTALE,EIO"}, {"readdir", "ESTALE,EIO"},
    {"lock", "ENOLCK,EOPNOTSUPP"},
};

typedef struct { char rank[16], calls[128], path[128], kinds[128]; uint64_t one_in; int most, used; } Rule;

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static Rule rules[RULES];
static int count, owner, log_file = -1, trace;
static uint64_t seed;
static char below[4096];
static struct { uint64_t key; uint32_t calls; } seen[CALLS];
static struct { DIR *listing; char name[256]; } hidden[LISTINGS];

static uint64_t mix(uint64_t hash, const char *text) {
    for (; *text; text++) hash = (hash ^ (unsigned char)*text) * 1099511628211ULL;
    hash ^= hash >> 33;
    hash *= 0xff51afd7ed558ccdULL;
    return hash ^ hash >> 29;
}

// Only the main thread reads variables: it also sets some, and getenv in another thread could then read freed memory.
static const char *rank_of(void) {
    static char rank[16] = "-";
    if (gettid() == getpid()) {
        const char *now = getenv("RANK");
        if (!now || !*now) now = "-";
        if (strcmp(rank, now)) snprintf(rank, sizeof rank, "%s", now);
    }
    return rank;
}

// Reads the variables, once in each process.
static int configured(void) {
    if (owner == getpid()) return 1;
    if (gettid() != getpid()) return 0;
    const char *text = getenv("FAULTS"), *folder = getenv("FAULTS_BELOW"), *path = getenv("FAULTS_LOG");
    if (!text || !folder || !path) return 0;
    pthread_mutex_lock(&mutex);
    if (owner != getpid()) {
        memset(seen, 0, sizeof seen);
        snprintf(below, sizeof below, "%s", folder);
        seed = mix(1469598103934665603ULL, getenv("FAULTS_SEED") ? getenv("FAULTS_SEED") : "");
        trace = getenv("FAULTS_TRACE") != NULL;
        char copy[4096], *rest = NULL;
        snprintf(copy, sizeof copy, "%s", text);
        count = 0;
        for (char *part = strtok_r(copy, ";", &rest); part; part = strtok_r(NULL, ";", &rest)) {
            Rule *rule = &rules[count];
            rule->used = 0;
            int fields = sscanf(part, "%15s %127s %127s %127s %lu %d", rule->rank, rule->calls, rule->path, rule->kinds,
                                &rule->one_in, &rule->most);
            if (fields == 6 && ++count < RULES) continue;
            if (fields == 6 || fields > 0) { fprintf(stderr, "faulty_files: bad rule: %s\n", part); abort(); }
        }
        int file = syscall(SYS_openat, AT_FDCWD, path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
        log_file = syscall(SYS_fcntl, file, F_DUPFD_CLOEXEC, 900);  // where nobody closes it
        syscall(SYS_close, file);
        owner = getpid();
    }
    pthread_mutex_unlock(&mutex);
    return 1;
}

static void note(const char *kind, const char *call, const char *path, const char *detail) {
    char line[9000];
    int size = snprintf(line, sizeof line, "%s\t%s\t%s\t%d\t%s\t%s\n", kind, call, rank_of(), getpid(), path, detail);
    syscall(SYS_write, log_file, line, size);
}

static void path_of(int file, char *path) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t size = syscall(SYS_readlink, link, path, 4095);
    path[size < 0 ? 0 : size] = 0;
}

// Writes the whole path of a name into `path`; returns whether it is below the folder.
static int is_below(int dir, const char *name, char *path) {
    if (!configured()) return 0;
    path[0] = 0;
    if (name && name[0] == '/') {
        snprintf(path, 4096, "%s", name);
    } else {
        if (dir == AT_FDCWD) { if (syscall(SYS_getcwd, path, 4095) < 0) path[0] = 0; }
        else path_of(dir, path);
        size_t size = strlen(path);
        if (name && *name) snprintf(path + size, 4096 - size, "/%s", name);
    }
    size_t size = strlen(below);
    return strncmp(path, below, size) == 0 && (path[size] == '/' || path[size] == 0);
}

static int in_list(const char *list, const char *word) {
    size_t size = strlen(word);
    for (const char *at = list; (at = strstr(at, word)); at += size)
        if ((at == list || at[-1] == ',') && (at[size] == ',' || at[size] == 0)) return 1;
    return strcmp(list, "*") == 0;
}

static int matches(const Rule *rule, const char *call, const char *path) {
    char parts[128], *rest = NULL;
    int has = strcmp(rule->path, "*") == 0;
    snprintf(parts, sizeof parts, "%s", rule->path + (rule->path[0] == '!'));
    for (char *part = strtok_r(parts, ",", &rest); part; part = strtok_r(NULL, ",", &rest))
        has = has || strstr(path, part) != NULL;
    return rule->used < rule->most && (strcmp(rule->rank, "*") == 0 || strcmp(rule->rank, rank_of()) == 0) &&
           in_list(rule->calls, call) && has != (rule->path[0] == '!');
}

static int choose(const char *kinds, const char *call, uint64_t hash, const char **name) {
    if (strcmp(kinds, "any") == 0)
        for (size_t k = 0; k < sizeof ANY / sizeof *ANY; k++)
            if (strcmp(ANY[k].call, call) == 0) kinds = ANY[k].kinds;
    int codes[KINDS], many = 0;
    const char *names[KINDS];
    for (size_t k = 0; k < sizeof NAMES / sizeof *NAMES; k++)
        if (in_list(kinds, NAMES[k].name)) { codes[many] = NAMES[k].code; names[many++] = NAMES[k].name; }
    if (!many) { fprintf(stderr, "faulty_files: bad kinds: %s\n", kinds); abort(); }
    *name = names[(hash >> 32) % many];
    return codes[(hash >> 32) % many];
}

// Returns the error that a call gets, or 0. Waits or kills the process if the fault is that.
static int fault(const char *call, const char *path) {
    const char *inside = path + strlen(below), *rank = rank_of(), *name = NULL;
    uint64_t key = mix(mix(mix(seed, rank), call), inside) | 1;
    int code = 0;
    uint32_t number = 0;
    pthread_mutex_lock(&mutex);
    for (uint64_t k = 0; k < CALLS; k++) {
        size_t slot = (key + k) % CALLS;
        if (seen[slot].key && seen[slot].key != key) continue;
        seen[slot].key = key;
        number = ++seen[slot].calls;
        break;
    }
    char text[24];
    snprintf(text, sizeof text, "%u", number);
    for (int k = 0; k < count && !code; k++) {
        uint64_t hash = mix(key + k, text);
        if (!matches(&rules[k], call, inside) || hash % rules[k].one_in) continue;
        rules[k].used++;
        code = choose(rules[k].kinds, call, hash, &name);
    }
    pthread_mutex_unlock(&mutex);
    if (!code) return 0;
    note(name, call, path, text);
    if (code == KILL) kill(getpid(), SIGKILL);
    if (code == SLOW) usleep(500000);
    return code == SLOW ? 0 : code;
}

static void done(const char *call, const char *path, int file) {
    if (!trace) return;
    struct stat status = {0};
    if (file >= 0) REAL(fstat)(file, &status);
    char size[24];
    snprintf(size, sizeof size, "%ld", (long)status.st_size);
    note("done", call, path, size);
}

// Runs a call on a path, unless it is to fail.
#define ON_PATH(call, dir, name, failed, expression) ({ \
    char path[4096]; \
    int code, is_ours = is_below(dir, name, path); \
    __typeof__(expression) result = failed; \
    if (is_ours && (code = fault(call, path))) errno = code; \
    else result = expression; \
    if (is_ours && result != failed && strcmp(call, "stat") && strcmp(call, "list")) done(call, path, -1); \
    result; })

static int open_it(int (*real)(int, const char *, int, ...), int dir, const char *name, int flags, mode_t mode) {
    char path[4096];
    if (!is_below(dir, name, path)) return real(dir, name, flags, mode);
    int code, writes = (flags & O_ACCMODE) != O_RDONLY;
    if ((code = fault(writes ? "create" : "open", path))) { errno = code; return -1; }
    int file = real(dir, name, flags, mode);
    if (file >= 0 && writes) done("create", path, file);
    return file;
}

#define OPEN(name, at) \
    int name(const char *path, int flags, ...) { \
        va_list more; va_start(more, flags); mode_t mode = va_arg(more, mode_t); va_end(more); \
        return open_it(REAL(at), AT_FDCWD, path, flags, mode); } \
    int at(int dir, const char *path, int flags, ...) { \
        va_list more; va_start(more, flags); mode_t mode = va_arg(more, mode_t); va_end(more); \
        return open_it(REAL(at), dir, path, flags, mode); }
OPEN(open, openat)
OPEN(open64, openat64)

static int on_file(const char *call, int file) {
    char path[4096];
    int code;
    if (!is_below(file, NULL, path) || !(code = fault(call, path))) return 0;
    errno = code;
    return -1;
}

#define ON_FILE(type, name, call, parameters, arguments) \
    type name parameters { return on_file(call, file) ? -1 : REAL(name) arguments; }
ON_FILE(ssize_t, read, "read", (int file, void *data, size_t size), (file, data, size))
ON_FILE(ssize_t, readv, "read", (int file, const struct iovec *parts, int many), (file, parts, many))
ON_FILE(ssize_t, pread, "read", (int file, void *data, size_t size, off_t at), (file, data, size, at))
ON_FILE(ssize_t, pread64, "read", (int file, void *data, size_t size, off64_t at), (file, data, size, at))
ON_FILE(ssize_t, write, "write", (int file, const void *data, size_t size), (file, data, size))
ON_FILE(ssize_t, writev, "write", (int file, const struct iovec *parts, int many), (file, parts, many))
ON_FILE(ssize_t, pwrite, "write", (int file, const void *data, size_t size, off_t at), (file, data, size, at))
ON_FILE(ssize_t, pwrite64, "write", (int file, const void *data, size_t size, off64_t at), (file, data, size, at))
ON_FILE(int, ftruncate, "write", (int file, off_t size), (file, size))
ON_FILE(int, ftruncate64, "write", (int file, off64_t size), (file, size))
ON_FILE(int, flock, "lock", (int file, int operation), (file, operation))
ON_FILE(int, fstat, "stat", (int file, struct stat *status), (file, status))
ON_FILE(int, fstat64, "stat", (int file, struct stat64 *status), (file, status))

static int sync_it(int (*real)(int), int file) {
    if (on_file("sync", file)) return -1;
    int result = real(file);
    char path[4096];
    if (result == 0 && is_below(file, NULL, path)) done("sync", path, file);
    return result;
}
int fsync(int file) { return sync_it(REAL(fsync), file); }
int fdatasync(int file) { return sync_it(REAL(fdatasync), file); }

static int rename_it(int from_dir, const char *from, int to_dir, const char *to, unsigned flags) {
    char path[4096], before[4096];
    int code, is_ours = is_below(to_dir, to, path);
    if (is_ours && (code = fault("rename", path))) { errno = code; return -1; }
    int result = REAL(renameat2)(from_dir, from, to_dir, to, flags);
    if (is_ours && result == 0 && trace) { is_below(from_dir, from, before); note("done", "rename", path, before); }
    return result;
}
int rename(const char *from, const char *to) { return rename_it(AT_FDCWD, from, AT_FDCWD, to, 0); }
int renameat(int from_dir, const char *from, int to_dir, const char *to) {
    return rename_it(from_dir, from, to_dir, to, 0);
}
int renameat2(int from_dir, const char *from, int to_dir, const char *to, unsigned flags) {
    return rename_it(from_dir, from, to_dir, to, flags);
}

int unlink(const char *name) { return ON_PATH("unlink", AT_FDCWD, name, -1, REAL(unlink)(name)); }
int rmdir(const char *name) { return ON_PATH("rmdir", AT_FDCWD, name, -1, REAL(rmdir)(name)); }
int unlinkat(int dir, const char *name, int flags) {
    const char *call = flags & AT_REMOVEDIR ? "rmdir" : "unlink";
    return ON_PATH(call, dir, name, -1, REAL(unlinkat)(dir, name, flags));
}
int mkdir(const char *name, mode_t mode) { return ON_PATH("mkdir", AT_FDCWD, name, -1, REAL(mkdir)(name, mode)); }
int mkdirat(int dir, const char *name, mode_t mode) {
    return ON_PATH("mkdir", dir, name, -1, REAL(mkdirat)(dir, name, mode));
}

#define STAT(name, type) \
    int name(const char *path_, type *status) { \
        return ON_PATH("stat", AT_FDCWD, path_, -1, REAL(name)(path_, status)); }
#define STAT_AT(name, type) \
    int name(int dir, const char *path_, type *status, int flags) { \
        return ON_PATH("stat", dir, path_, -1, REAL(name)(dir, path_, status, flags)); }
STAT(stat, struct stat)
STAT(lstat, struct stat)
STAT(stat64, struct stat64)
STAT(lstat64, struct stat64)
STAT_AT(fstatat, struct stat)
STAT_AT(fstatat64, struct stat64)
int statx(int dir, const char *restrict name, int flags, unsigned mask, struct statx *restrict status) {
    return ON_PATH("stat", dir, name, -1, REAL(statx)(dir, name, flags, mask, status));
}
// Of programs that were built with an earlier glibc.
int __xstat(int version, const char *name, struct stat *status) { return (void)version, stat(name, status); }
int __lxstat(int version, const char *name, struct stat *status) { return (void)version, lstat(name, status); }
int __fxstat(int version, int file, struct stat *status) { return (void)version, fstat(file, status); }
int __xstat64(int version, const char *name, struct stat64 *status) { return (void)version, stat64(name, status); }
int __lxstat64(int version, const char *name, struct stat64 *status) { return (void)version, lstat64(name, status); }
int __fxstat64(int version, int file, struct stat64 *status) { return (void)version, fstat64(file, status); }

static void hide(DIR *listing, const char *newest) {
    pthread_mutex_lock(&mutex);
    for (int k = 0; k < LISTINGS; k++)
        if (hidden[k].listing == (newest ? NULL : listing)) {
            hidden[k].listing = newest ? listing : NULL;
            snprintf(hidden[k].name, sizeof hidden[k].name, "%s", newest ? newest : "");
            break;
        }
    pthread_mutex_unlock(&mutex);
}

static void hide_newest(DIR *listing) {
    char newest[256] = "";
    struct timespec last = {-1, 0};
    for (struct dirent *entry; (entry = REAL(readdir)(listing));) {
        struct stat status;
        if (entry->d_name[0] == '.' || REAL(fstatat)(dirfd(listing), entry->d_name, &status, AT_SYMLINK_NOFOLLOW))
            continue;
        struct timespec time = status.st_mtim;
        if (time.tv_sec < last.tv_sec || (time.tv_sec == last.tv_sec && time.tv_nsec < last.tv_nsec)) continue;
        last = time;
        snprintf(newest, sizeof newest, "%s", entry->d_name);
    }
    rewinddir(listing);
    if (*newest) hide(listing, newest);
}

static DIR *list(int dir, const char *name, DIR *(*by_name)(const char *), DIR *(*by_file)(int)) {
    char path[4096];
    int code = is_below(dir, name, path) ? fault("list", path) : 0;
    if (code && code != STALE) { errno = code; return NULL; }
    DIR *listing = by_name ? by_name(name) : by_file(dir);
    if (listing && code == STALE) hide_newest(listing);
    return listing;
}
DIR *opendir(const char *name) { return list(AT_FDCWD, name, REAL(opendir), NULL); }
DIR *fdopendir(int file) { return list(file, NULL, NULL, REAL(fdopendir)); }
int closedir(DIR *listing) {
    if (configured()) hide(listing, NULL);
    return REAL(closedir)(listing);
}

static int is_hidden(DIR *listing, const char *name) {
    for (int k = 0; k < LISTINGS; k++)
        if (hidden[k].listing == listing && strcmp(hidden[k].name, name) == 0) return 1;
    return 0;
}
#define READDIR(name, type) \
    struct type *name(DIR *listing) { \
        if (on_file("readdir", dirfd(listing))) return NULL; \
        struct type *entry; \
        while ((entry = REAL(name)(listing)) && is_hidden(listing, entry->d_name)); \
        return entry; }
READDIR(readdir, dirent)
READDIR(readdir64, dirent64)
