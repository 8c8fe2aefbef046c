/* Producers on threads of their own and one consumer at the library's ring, without Python: for
   ThreadSanitizer, and to see that nothing is lost, torn or reordered at full speed.

   usage: ring_race PRODUCERS FRAMES CAPACITY LARGEST

   Each producer sends FRAMES / PRODUCERS frames of random sizes up to LARGEST bytes. A frame is its
   producer, its number, and bytes that both determine. One producer claims as such. The consumer
   sleeps on a semaphore whenever
   the ring is empty. Prints "ok FRAMES SLEEPS FULL" and ends with 0, or says what was wrong. */

#include <pthread.h>
#include <sched.h>
#include <semaphore.h>
#include <stdio.h>

#include "ring.h"

typedef struct {
    uint32_t producer;
    uint32_t number;
} stamp;

static domi_ring *ring;
static sem_t wake;
static uint32_t frames_each, largest;
static _Atomic uint64_t full;
static uint8_t *(*claim)(domi_ring *, uint32_t) = domi_ring_claim;
static void (*publish)(domi_ring *, uint8_t *, uint32_t, int) = domi_ring_publish;

static uint64_t mix(uint64_t v)     /* splitmix64 (Steele, Lea and Flood, 2014) */
{
    v += 0x9e3779b97f4a7c15u;
    v = (v ^ (v >> 30)) * 0xbf58476d1ce4e5b9u;
    v = (v ^ (v >> 27)) * 0x94d049bb133111ebu;
    return v ^ (v >> 31);
}

static uint32_t size_of(stamp s)
{
    return (uint32_t)(sizeof(stamp) +
                      mix((uint64_t)s.producer << 32 | s.number) % (largest - sizeof(stamp) + 1));
}

static uint8_t byte_of(stamp s, uint32_t i)
{
    return (uint8_t)(s.number * 31u + s.producer * 7u + i);
}

static void *produce(void *argument)
{
    stamp s = {(uint32_t)(uintptr_t)argument, 0};
    for (; s.number < frames_each; s.number++) {
        const uint32_t size = size_of(s);
        uint8_t *payload;
        while ((payload = claim(ring, size)) == NULL) {
            atomic_fetch_add_explicit(&full, 1, memory_order_relaxed);
            sched_yield();
        }
        memcpy(payload, &s, sizeof s);
        for (uint32_t i = sizeof s; i < size; i++)
            payload[i] = byte_of(s, i);
        publish(ring, payload, size, RING_FRAME);
        if (domi_ring_must_wake(ring))
            sem_post(&wake);
    }
    return NULL;
}

static int wrong(const char *what, stamp s)
{
    printf("%s: producer %u, frame %u\n", what, s.producer, s.number);
    return 1;
}

int main(int argc, char **argv)
{
    pthread_t threads[64];
    uint32_t next[64] = {0}, size, producers;
    uint64_t left, sleeps = 0, total;
    uint8_t *payload;
    int kind;
    if (argc != 5) {
        fprintf(stderr, "usage: %s PRODUCERS FRAMES CAPACITY LARGEST\n", argv[0]);
        return 2;
    }
    producers = (uint32_t)atoi(argv[1]);
    frames_each = (uint32_t)(atoll(argv[2]) / producers);
    ring = domi_ring_new((uint64_t)atoll(argv[3]));
    largest = (uint32_t)atoi(argv[4]);
    if (ring == NULL || producers < 1 || producers > 64 || largest < sizeof(stamp)
        || largest > domi_ring_most(ring)) {
        fprintf(stderr, "%s: these cannot be\n", argv[0]);
        return 2;
    }
    if (producers == 1) {
        claim = domi_ring_claim_alone;
        publish = domi_ring_publish_alone;
    }
    sem_init(&wake, 0, 0);
    total = left = (uint64_t)frames_each * producers;
    for (uint32_t i = 0; i < producers; i++)
        pthread_create(&threads[i], NULL, produce, (void *)(uintptr_t)i);
    while (left) {
        stamp s;
        payload = domi_ring_peek(ring, &size, &kind);
        if (payload == NULL) {
            if (left % 2 && producers > 1)
                domi_ring_rewind(ring);
            /* Now and then it spins first, as long as a producer lets it. */
            if (left % 3 == 0) {
                domi_ring_will_sleep(ring, RING_SPINS);
                payload = domi_ring_peek(ring, &size, &kind);
                for (int i = 0; payload == NULL && i < 1000; i++)
                    if (domi_ring_was_woken(ring))
                        payload = domi_ring_peek(ring, &size, &kind);
            }
            if (payload == NULL) {
                domi_ring_will_sleep(ring, RING_SLEEPS);
                payload = domi_ring_peek(ring, &size, &kind);
            }
            if (payload == NULL) {
                struct timespec limit;
                clock_gettime(CLOCK_REALTIME, &limit);
                limit.tv_sec += 60;
                if (sem_timedwait(&wake, &limit) != 0) {
                    printf("nobody woke the consumer; %llu frames are missing\n",
                           (unsigned long long)left);
                    return 1;
                }
                sleeps++;
                continue;
            }
            domi_ring_is_awake(ring);
        }
        memcpy(&s, payload, sizeof s);
        if (kind != RING_FRAME || s.producer >= producers)
            return wrong("not a frame", s);
        if (s.number != next[s.producer]++)
            return wrong("lost or out of order", s);
        if (size != size_of(s))
            return wrong("another size", s);
        for (uint32_t i = sizeof s; i < size; i++)
            if (payload[i] != byte_of(s, i))
                return wrong("torn", s);
        domi_ring_consume(ring, payload, size);
        left--;
    }
    for (uint32_t i = 0; i < producers; i++)
        pthread_join(threads[i], NULL);
    if (domi_ring_count(ring) != 0 || domi_ring_used(ring) != 0) {
        printf("the ring is not empty\n");
        return 1;
    }
    for (uint64_t i = 0; i < ring->capacity; i++)
        if (ring->memory[i] != 0) {
            printf("byte %llu is not zero\n", (unsigned long long)i);
            return 1;
        }
    printf("ok %llu %llu %llu\n", (unsigned long long)total, (unsigned long long)sleeps,
           (unsigned long long)atomic_load(&full));
    domi_ring_free(ring);
    return 0;
}
