/* A byte ring of whole records: many producers, one consumer, no lock. C11, by itself, so that a
   program in C can be checked by ThreadSanitizer (tests/native/ring_race.c).

   Positions are bytes since the beginning, 64 bits that never wrap; the place of a position in the
   memory is its low bits. [tail, head) is claimed. A record is a word, four bytes unused, and its
   payload, padded to 8 bytes:

       word = 0                    claimed and being written, or not claimed at all
       word = size << 2 | kind     published

   A record never wraps round the end of the memory: a producer whose record does not fit before
   the end claims the rest too and marks it as a RING_PAD, so that every payload is contiguous.
   Records tile the positions without a gap, so the word at `tail` is always a record's word, never
   a payload's bytes of this lap; and it must read 0 until it is published in this lap, hence:
   everything that is not claimed is zero. The consumer zeroes a whole record before it gives the
   room back, since any eight-byte boundary in it may be a record's word in the next lap.

   The order of each atomic, and what would go wrong with a weaker one:

   head, load: relaxed. It is only a guess that the compare-and-swap confirms.
   tail, load by producers: acquire, with the consumer's release. The consumer's zeroing of the room
       happens before the producer's writes to it; with relaxed, a zero could overwrite payload.
   head, compare-and-swap: relaxed. It makes the claim exclusive, which atomicity alone does, and
       publishes nothing. A `tail` that was read before it can only have grown since: the room
       that was free is still free. The head cannot come back to a former value: 64 bits.
   word, store on publishing: release; load by the consumer: acquire. The payload is seen with the
       word. Records may be published out of order; the consumer stops at the first word of 0.
   word of a pad: release too. It has no payload to show, but its storing must happen before the
       consumer's giving back, and so before the payload that a producer of the next lap writes there.
   word, store of 0: relaxed. The release of `tail` that follows orders it before the next claim.
   tail, store: release, with the producers' acquire above. Only the consumer writes it.
   puts, gets: relaxed. Numbers for people; nothing is reached through them. A put is counted before
       its record is published, so that the consumer never counts more gets than puts.
   owned: relaxed, by read-modify-write on both sides. A number that limits; nothing is reached
       through it. It is added to before the record is published, and so never goes below 0.
   sleeping, exchange on both sides: acquire and release. Read-modify-writes of one variable have
       one order. If the producer's comes after the consumer's, it reads what the consumer wrote and
       the producer wakes the consumer. If it comes before, the consumer's reads what the producer's
       wrote, so all that the producer did before, the publishing among it, happens before the
       consumer's second look at the ring, which finds the record. With plain loads and stores both
       could miss.
   sleeping, load by a spinning consumer: acquire. It only waits for the producer's exchange, and
       looks at the ring after it.  */

#ifndef DOMI_RING_H
#define DOMI_RING_H

#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define RING_HEADER 8u
#define RING_LINE 64

enum { RING_FRAME = 1, RING_PAD = 2, RING_REFERENCE = 3 };
enum { RING_AWAKE = 0, RING_SLEEPS = 1, RING_SPINS = 2 };

typedef struct {
    /* Written by producers. */
    _Alignas(RING_LINE) _Atomic uint64_t head;
    _Atomic uint64_t puts;
    /* Written by the consumer. */
    _Alignas(RING_LINE) _Atomic uint64_t tail;
    _Atomic uint64_t gets;
    /* Written by both, seldom. */
    _Alignas(RING_LINE) _Atomic uint32_t sleeping;
    _Atomic uint64_t owned;         /* bytes of the objects that its records refer to */
    /* Never written once it is made. */
    _Alignas(RING_LINE) uint64_t capacity;
    uint8_t *memory;                /* owned (calloc) */
} domi_ring;

/* A ring of so many bytes, a power of two of at least 64; NULL when there is no memory. */
static inline domi_ring *domi_ring_new(uint64_t capacity)
{
    domi_ring *ring = aligned_alloc(RING_LINE, sizeof(domi_ring));
    if (ring == NULL)
        return NULL;
    atomic_init(&ring->head, 0);
    atomic_init(&ring->puts, 0);
    atomic_init(&ring->tail, 0);
    atomic_init(&ring->gets, 0);
    atomic_init(&ring->sleeping, 0);
    atomic_init(&ring->owned, 0);
    ring->capacity = capacity;
    ring->memory = calloc(1, capacity);
    if (ring->memory == NULL) {
        free(ring);
        return NULL;
    }
    return ring;
}

static inline void domi_ring_free(domi_ring *ring)
{
    if (ring != NULL) {
        free(ring->memory);
        free(ring);
    }
}

static inline _Atomic uint32_t *domi_ring_word(domi_ring *ring, uint64_t position)
{
    return (_Atomic uint32_t *)(ring->memory + (position & (ring->capacity - 1)));
}

static inline uint64_t domi_ring_room(uint64_t size)
{
    return (RING_HEADER + size + 7u) & ~(uint64_t)7;
}

/* The largest payload: with it a record and the pad before it still fit into an empty ring. */
static inline uint64_t domi_ring_most(const domi_ring *ring)
{
    return ring->capacity / 2 - RING_HEADER;
}

/* ---- producers, any thread ---- */

/* Where the payload of a claim that begins at `head` lies, behind the pad that it may need. */
static inline uint8_t *domi_ring_place(domi_ring *ring, uint64_t head, uint64_t need, uint64_t rest)
{
    if (need > rest) {
        atomic_store_explicit(domi_ring_word(ring, head), (uint32_t)((rest - RING_HEADER) << 2)
                              | RING_PAD, memory_order_release);
        head += rest;
    }
    return ring->memory + (head & (ring->capacity - 1)) + RING_HEADER;
}

/* What the next claim of the only producer takes of the ring, with the pad that it may need. */
static inline uint64_t domi_ring_takes(domi_ring *ring, uint32_t size)
{
    const uint64_t need = domi_ring_room(size);
    const uint64_t head = atomic_load_explicit(&ring->head, memory_order_relaxed);
    const uint64_t rest = ring->capacity - (head & (ring->capacity - 1));
    return need <= rest ? need : rest + need;
}

/* Room for a payload of `size` bytes, at most domi_ring_most(); NULL when the ring is full. What is
   claimed must be published, and soon: the consumer cannot pass it. */
static inline uint8_t *domi_ring_claim(domi_ring *ring, uint32_t size)
{
    const uint64_t capacity = ring->capacity, need = domi_ring_room(size);
    uint64_t head = atomic_load_explicit(&ring->head, memory_order_relaxed);
    uint64_t rest, total, tail, again;
    for (;;) {
        tail = atomic_load_explicit(&ring->tail, memory_order_acquire);
        rest = capacity - (head & (capacity - 1));
        total = need <= rest ? need : rest + need;
        if (tail > head || head + total - tail > capacity) {
            /* Full, unless the head that was read is out of date. */
            again = atomic_load_explicit(&ring->head, memory_order_relaxed);
            if (again == head)
                return NULL;
            head = again;
        } else if (atomic_compare_exchange_weak_explicit(
                       &ring->head, &head, head + total, memory_order_relaxed,
                       memory_order_relaxed)) {
            break;
        }
    }
    return domi_ring_place(ring, head, need, rest);
}

/* The same for a producer that knows itself to be the only one: a claim without a locked bus. */
static inline uint8_t *domi_ring_claim_alone(domi_ring *ring, uint32_t size)
{
    const uint64_t capacity = ring->capacity, need = domi_ring_room(size);
    uint64_t head = atomic_load_explicit(&ring->head, memory_order_relaxed);
    uint64_t tail = atomic_load_explicit(&ring->tail, memory_order_acquire);
    uint64_t rest = capacity - (head & (capacity - 1));
    uint64_t total = need <= rest ? need : rest + need;
    if (head + total - tail > capacity)
        return NULL;
    atomic_store_explicit(&ring->head, head + total, memory_order_relaxed);
    return domi_ring_place(ring, head, need, rest);
}

static inline void domi_ring_publish_alone(domi_ring *ring, uint8_t *payload, uint32_t size, int kind)
{
    atomic_store_explicit(
        &ring->puts, atomic_load_explicit(&ring->puts, memory_order_relaxed) + 1,
        memory_order_relaxed);
    atomic_store_explicit((_Atomic uint32_t *)(payload - RING_HEADER),
                          size << 2 | (uint32_t)kind, memory_order_release);
}

static inline void domi_ring_publish(domi_ring *ring, uint8_t *payload, uint32_t size, int kind)
{
    atomic_fetch_add_explicit(&ring->puts, 1, memory_order_relaxed);
    atomic_store_explicit((_Atomic uint32_t *)(payload - RING_HEADER),
                          size << 2 | (uint32_t)kind, memory_order_release);
}

/* Before a record that refers to an object of so many bytes is published. */
static inline void domi_ring_own(domi_ring *ring, uint64_t bytes)
{
    atomic_fetch_add_explicit(&ring->owned, bytes, memory_order_relaxed);
}

/* After it was taken out. */
static inline void domi_ring_disown(domi_ring *ring, uint64_t bytes)
{
    atomic_fetch_sub_explicit(&ring->owned, bytes, memory_order_relaxed);
}

/* Whether an object of so many bytes may come to those that records refer to: one always may. */
static inline int domi_ring_may_own(domi_ring *ring, uint64_t bytes, uint64_t most)
{
    const uint64_t owned = atomic_load_explicit(&ring->owned, memory_order_relaxed);
    return owned == 0 || owned + bytes <= most;
}

/* After publishing: whether the consumer sleeps and must be woken by the caller. One that spins
   wakes by itself. */
static inline int domi_ring_must_wake(domi_ring *ring)
{
    return atomic_exchange_explicit(&ring->sleeping, RING_AWAKE, memory_order_acq_rel)
           == RING_SLEEPS;
}

/* ---- the consumer, one thread ---- */

/* The payload of the oldest record, its size and kind; NULL when there is none. */
static inline uint8_t *domi_ring_peek(domi_ring *ring, uint32_t *size, int *kind)
{
    uint64_t tail = atomic_load_explicit(&ring->tail, memory_order_relaxed);
    _Atomic uint32_t *at = domi_ring_word(ring, tail);
    uint32_t word = atomic_load_explicit(at, memory_order_acquire);
    if ((word & 3) == RING_PAD) {
        atomic_store_explicit(at, 0, memory_order_relaxed);
        tail += (word >> 2) + RING_HEADER;
        atomic_store_explicit(&ring->tail, tail, memory_order_release);
        at = domi_ring_word(ring, tail);
        word = atomic_load_explicit(at, memory_order_acquire);
    }
    if (word == 0)
        return NULL;
    *size = word >> 2;
    *kind = (int)(word & 3);
    return (uint8_t *)at + RING_HEADER;
}

/* `size` is a multiple of 8. Up to 64 bytes, stores that overlap cost less than a call. */
static inline void domi_ring_zero(uint8_t *at, uint64_t size)
{
    static const uint8_t zero[16] = {0};
    if (size > 64)
        memset(at, 0, size);
    else if (size >= 16) {
        memcpy(at, zero, 16);
        memcpy(at + size - 16, zero, 16);
        if (size > 32) {
            memcpy(at + 16, zero, 16);
            memcpy(at + size - 32, zero, 16);
        }
    } else if (size)
        memcpy(at, zero, 8);
}

/* Gives back the record that domi_ring_peek has just shown. */
static inline void domi_ring_consume(domi_ring *ring, uint8_t *payload, uint32_t size)
{
    uint64_t tail = atomic_load_explicit(&ring->tail, memory_order_relaxed);
    uint64_t room = domi_ring_room(size);
    domi_ring_zero(payload, room - RING_HEADER);
    atomic_store_explicit((_Atomic uint32_t *)(payload - RING_HEADER), 0, memory_order_relaxed);
    atomic_store_explicit(
        &ring->gets, atomic_load_explicit(&ring->gets, memory_order_relaxed) + 1,
        memory_order_relaxed);
    atomic_store_explicit(&ring->tail, tail + room, memory_order_release);
}

/* When there is nothing to peek at: go on at the beginning of the memory, which is in a cache still,
   by claiming what lies before its end and giving it back at once. No claim is under way when the
   head is where the tail is, so the compare-and-swap that finds it there may be relaxed: as a
   producer's claim it publishes nothing, and as a consumer's it has nothing to read. Never beside a
   producer on another thread that claims alone, which would not notice. */
static inline void domi_ring_rewind(domi_ring *ring)
{
    uint64_t tail = atomic_load_explicit(&ring->tail, memory_order_relaxed), head = tail;
    uint64_t rest = ring->capacity - (tail & (ring->capacity - 1));
    if (rest < ring->capacity
        && atomic_compare_exchange_strong_explicit(
            &ring->head, &head, tail + rest, memory_order_relaxed, memory_order_relaxed))
        atomic_store_explicit(&ring->tail, tail + rest, memory_order_release);
}

/* Before sleeping or spinning (`how`). Whatever is published from now on wakes; the consumer must
   look once more. */
static inline void domi_ring_will_sleep(domi_ring *ring, uint32_t how)
{
    atomic_exchange_explicit(&ring->sleeping, how, memory_order_acq_rel);
}

static inline void domi_ring_is_awake(domi_ring *ring)
{
    atomic_exchange_explicit(&ring->sleeping, RING_AWAKE, memory_order_acq_rel);
}

/* While spinning: whether a producer has asked the consumer to look. */
static inline int domi_ring_was_woken(domi_ring *ring)
{
    return atomic_load_explicit(&ring->sleeping, memory_order_acquire) == RING_AWAKE;
}

/* Whether there is nothing to peek at. */
static inline int domi_ring_is_empty(domi_ring *ring)
{
    uint64_t tail = atomic_load_explicit(&ring->tail, memory_order_relaxed);
    return atomic_load_explicit(domi_ring_word(ring, tail), memory_order_acquire) == 0;
}

/* Records that have been taken out. */
static inline uint64_t domi_ring_gets(domi_ring *ring)
{
    return atomic_load_explicit(&ring->gets, memory_order_relaxed);
}

/* Records and bytes in it; exact for the consumer when no producer is at work. */
static inline uint64_t domi_ring_count(domi_ring *ring)
{
    uint64_t gets = atomic_load_explicit(&ring->gets, memory_order_relaxed);
    return atomic_load_explicit(&ring->puts, memory_order_relaxed) - gets;
}

static inline uint64_t domi_ring_used(domi_ring *ring)
{
    uint64_t tail = atomic_load_explicit(&ring->tail, memory_order_acquire);
    return atomic_load_explicit(&ring->head, memory_order_relaxed) - tail;
}

#endif
