/* What the two echo programs have in common: the frame, the clock, and how a result is written. */
#define _GNU_SOURCE
#include <errno.h>
#include <inttypes.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sched.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { FRAME = 12, BUFFER = 65536 };

/* u32 length, u16 extend_size, u16 channel, four bytes of data */
static const char frame[FRAME] = {FRAME, 0, 0, 0, 0, 0, 50, 0, 'p', 'i', 'n', 'g'};

_Noreturn static void die(const char *what) {
    perror(what);
    exit(1);
}

static uint64_t now_ns(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (uint64_t)time.tv_sec * 1000000000u + (uint64_t)time.tv_nsec;
}

static void pin(int cpu) {
    if (cpu < 0) return;
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(cpu, &set);
    if (sched_setaffinity(0, sizeof set, &set) < 0) die("sched_setaffinity");
}

static struct sockaddr_in loopback(int port) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    return address;
}

static void set_no_delay(int fd) {
    int on = 1;
    if (setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on) < 0) die("TCP_NODELAY");
}

/* What is under way at a time is smaller than any socket buffer: a short send is a fault. */
static bool send_all(int fd, const char *data, size_t size) {
    ssize_t sent = send(fd, data, size, MSG_NOSIGNAL);
    return sent == (ssize_t)size;
}

/* Echoes what has arrived. Returns false when the connection is over. */
static bool echo(int fd) {
    static char buffer[BUFFER];
    ssize_t size = recv(fd, buffer, sizeof buffer, MSG_DONTWAIT);
    if (size < 0) return errno == EAGAIN || errno == EINTR;
    return size > 0 && send_all(fd, buffer, (size_t)size);
}

static int by_size(const void *left, const void *right) {
    uint64_t a = *(const uint64_t *)left, b = *(const uint64_t *)right;
    return (a > b) - (a < b);
}

/* By the nearest rank. */
static uint64_t percentile(const uint64_t *sorted, long count, double share) {
    long rank = (long)(share * (double)count + 0.999999);
    return sorted[rank < 1 ? 0 : rank > count ? count - 1 : rank - 1];
}

static uint64_t *room_for(long count) {
    uint64_t *taken = calloc((size_t)count, sizeof *taken);
    if (!taken) die("calloc");
    return taken;
}

/* Sorts what was taken. */
static void print_round_trips(const char *transport, bool busy, uint64_t *taken, long count,
                              long warm_up) {
    double sum = 0;
    for (long i = 0; i < count; i++) sum += (double)taken[i];
    qsort(taken, (size_t)count, sizeof *taken, by_size);
    printf("{\"transport\": \"%s\", \"busy\": %s, \"frame_bytes\": %d, \"count\": %ld, "
           "\"warm_up\": %ld, \"mean_ns\": %.0f, \"min_ns\": %" PRIu64 ", \"p50_ns\": %" PRIu64
           ", \"p99_ns\": %" PRIu64 ", \"p999_ns\": %" PRIu64 ", \"max_ns\": %" PRIu64 "}\n",
           transport, busy ? "true" : "false", FRAME, count, warm_up, sum / (double)count, taken[0],
           percentile(taken, count, 0.5), percentile(taken, count, 0.99),
           percentile(taken, count, 0.999), taken[count - 1]);
}

static long number(const char *text, const char *name, long least, long most) {
    char *end;
    errno = 0;
    long value = strtol(text, &end, 10);
    if (errno || end == text || *end || value < least || value > most) {
        fprintf(stderr, "--%s: %s is not a number from %ld to %ld\n", name, text, least, most);
        exit(2);
    }
    return value;
}
