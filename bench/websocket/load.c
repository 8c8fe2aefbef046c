/* The clients of a server under measurement, at so little cost that the server is what is measured.
 *
 * Each line of the input is a command, and is answered by a line of JSON:
 *
 *   connect PORT COUNT   opens so many more WebSocket connections to 127.0.0.1
 *   echo SECONDS SIZE    one binary message under way on each connection: messages a second
 *   say HEX BYTES        each connection that has said nothing yet says this, and gets so many bytes
 *   drain BYTES [TIMES]  throws away what comes until it was so much: when, by the monotonic clock;
 *                        and so on, a line for each time
 *   watch FRAMES SIZE    so many frames of SIZE bytes, over all connections: percentiles of the time
 *                        since the nanoseconds that are their last 8 bytes, of those that have any
 *   close                resets all connections
 *
 * Only the answers to the handshakes are read; of what follows the bytes are counted.
 */
#include <arpa/inet.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { MOST = 65536, TOGETHER = 50, EVENTS = 1024, TIMEOUT_MS = 60000, PAUSE_US = 2000 };
enum { STAMP = 8, BINARY = (char)0x82 };

static const char request[] =
    "GET / HTTP/1.1\r\nHost: bench\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n";

static int sockets[MOST], count, silent_from, poller;
static long missing[MOST]; /* by descriptor */
static char buffer[1 << 20];

static void fail(const char *what) {
    perror(what);
    exit(1);
}

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec + time.tv_nsec * 1e-9;
}

static void give(int fd, const char *data, size_t size) {
    if (send(fd, data, size, MSG_NOSIGNAL) != (ssize_t)size) fail("send");
}

static long take(int fd) {
    ssize_t size = recv(fd, buffer, sizeof buffer, 0);
    if (size <= 0) fail("the server has closed a connection");
    return size;
}

static int wait_for(struct epoll_event *events) {
    int ready = epoll_wait(poller, events, EVENTS, TIMEOUT_MS);
    if (ready <= 0) fail("nothing comes");
    return ready;
}

static void open_one(int port) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(port)};
    struct linger reset = {.l_onoff = 1}; /* leaves no port behind in TIME_WAIT */
    int one = 1, fd = socket(AF_INET, SOCK_STREAM, 0);
    if (fd < 0 || fd >= MOST) fail("socket");
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    setsockopt(fd, SOL_SOCKET, SO_LINGER, &reset, sizeof reset);
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    if (connect(fd, (struct sockaddr *)&address, sizeof address) < 0) fail("connect");
    give(fd, request, sizeof request - 1);
    sockets[count++] = fd;
}

static void await_answer(int fd) {
    struct epoll_event event = {.events = EPOLLIN, .data.fd = fd};
    char answer[4096];
    ssize_t size = 0;
    while (size < 4 || memcmp(answer + size - 4, "\r\n\r\n", 4)) {
        ssize_t got = recv(fd, answer + size, sizeof answer - size, 0);
        if (got <= 0) fail("no answer to the handshake");
        size += got;
    }
    if (memcmp(answer, "HTTP/1.1 101", 12)) fail("the handshake was refused");
    if (epoll_ctl(poller, EPOLL_CTL_ADD, fd, &event) < 0) fail("epoll_ctl");
}

static void open_many(int port, int more) {
    while (more > 0) {
        int first = count;
        for (int i = 0; i < TOGETHER && more > 0; i++, more--) open_one(port);
        for (int i = first; i < count; i++) await_answer(sockets[i]);
    }
    printf("{}\n");
}

static void say_all(const char *hex, long size) {
    char data[128];
    int length = (int)strlen(hex) / 2;
    for (int i = 0; i < length; i++) {
        unsigned byte;
        if (sscanf(hex + 2 * i, "%2x", &byte) != 1) fail("not in hex");
        data[i] = (char)byte;
    }
    while (silent_from < count) {
        int first = silent_from, behind = first + TOGETHER < count ? first + TOGETHER : count;
        for (int i = first; i < behind; i++) give(sockets[i], data, length);
        for (int i = first; i < behind; i++) {
            for (long rest = size; rest > 0;) rest -= take(sockets[i]);
        }
        silent_from = behind;
    }
    printf("{}\n");
}

static void echo(double seconds, int size) {
    /* A key of zeros masks nothing, and the server does the same work. */
    char frame[6 + 125] = {(char)0x82, (char)(0x80 | size)};
    struct epoll_event events[EVENTS];
    long done = 0, rest = (long)count * (size + 2);
    double began = now(), until = began + seconds, ended;
    for (int i = 0; i < count; i++) {
        give(sockets[i], frame, size + 6);
        missing[sockets[i]] = size + 2;
    }
    while ((ended = now()) < until) {
        for (int i = wait_for(events); i-- > 0;) {
            int fd = events[i].data.fd;
            if ((missing[fd] -= take(fd)) > 0) continue;
            give(fd, frame, size + 6);
            missing[fd] = size + 2;
            done++;
        }
    }
    for (int i = 0; i < count; i++) rest -= size + 2 - missing[sockets[i]];
    while (rest > 0) { /* the last of each are still to come */
        for (int i = wait_for(events); i-- > 0;) rest -= take(events[i].data.fd);
    }
    printf("{\"rate\": %.1f}\n", done / (ended - began));
}

static void drain(long size, long times) {
    struct epoll_event events[EVENTS];
    long rest = 0;
    while (times-- > 0) {
        rest += size; /* what has come of the next time already is not waited for again */
        while (rest > 0) {
            for (int i = wait_for(events); i-- > 0;) rest -= take(events[i].data.fd);
            if (rest > 0) usleep(PAUSE_US); /* then a socket has several frames to be thrown away */
        }
        printf("{\"ended\": %.6f}\n", now());
        fflush(stdout);
    }
}

static int compare(const void *one, const void *other) {
    uint64_t a = *(const uint64_t *)one, b = *(const uint64_t *)other;
    return (a > b) - (a < b);
}

static void watch(long frames, long size) {
    static unsigned char stamps[MOST][STAMP]; /* by descriptor, as are the bytes of a part */
    static long had[MOST];
    struct epoll_event events[EVENTS];
    uint64_t *taken = malloc(frames * sizeof *taken);
    long counted = 0;
    if (!taken) fail("malloc");
    while (frames > 0) {
        for (int i = wait_for(events); i-- > 0;) {
            int fd = events[i].data.fd;
            long got = take(fd), at = 0;
            uint64_t time = (uint64_t)(now() * 1e9), sent;
            while (at < got) {
                long part = size - had[fd] < got - at ? size - had[fd] : got - at;
                if (!had[fd] && buffer[at] != BINARY) fail("not the frame that is watched for");
                for (long j = 0; j < part; j++) {
                    long behind = had[fd] + j - (size - STAMP);
                    if (behind < 0) j -= behind + 1; /* to the one in front of the stamp */
                    else stamps[fd][behind] = buffer[at + j];
                }
                at += part;
                if ((had[fd] += part) < size) continue;
                had[fd] = 0;
                frames--;
                memcpy(&sent, stamps[fd], sizeof sent);
                if (sent) taken[counted++] = time - sent;
            }
        }
    }
    qsort(taken, counted, sizeof *taken, compare);
    printf("{\"count\": %ld", counted);
    for (int i = 0; i < 3 && counted; i++) {
        static const char *names[] = {"p50", "p99", "p999"};
        static const double shares[] = {0.5, 0.99, 0.999};
        long rank = (long)(shares[i] * counted + 0.999999);
        printf(", \"%s_ns\": %lu", names[i], (unsigned long)taken[rank > 0 ? rank - 1 : 0]);
    }
    printf("}\n");
    free(taken);
}

int main(void) {
    char line[256], word[16], hex[240];
    double first;
    long second;
    poller = epoll_create1(0);
    while (fgets(line, sizeof line, stdin)) {
        int given = sscanf(line, "%15s %lf %ld", word, &first, &second);
        if (given == 3 && !strcmp(word, "connect")) open_many((int)first, (int)second);
        else if (given == 3 && !strcmp(word, "echo") && second <= 125) echo(first, (int)second);
        else if (given >= 2 && !strcmp(word, "drain")) drain((long)first, given == 3 ? second : 1);
        else if (given == 3 && !strcmp(word, "watch")) watch((long)first, second);
        else if (sscanf(line, "say %239s %ld", hex, &second) == 2) say_all(hex, second);
        else if (given == 1 && !strcmp(word, "close")) {
            while (count > 0) close(sockets[--count]);
            silent_from = 0;
            printf("{}\n");
        } else {
            fprintf(stderr, "not a command: %s", line);
            return 2;
        }
        fflush(stdout);
    }
    return 0;
}
