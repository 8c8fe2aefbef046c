# Numbers of the wire and of the core. The Python twin of the channel table is channels.py.

cdef extern from *:
    """
    #include <time.h>
    #include <errno.h>
    #include <string.h>

    /* Little-endian loads and stores of any alignment: one instruction each. Compilers make as much
       of shifts that load, and a dozen instructions of shifts that store. */
    #if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    #define DOMI_LITTLE(bits, v) __builtin_bswap##bits(v)
    #else
    #define DOMI_LITTLE(bits, v) (v)
    #endif
    #define DOMI_LOAD_STORE(bits) \
        static inline uint##bits##_t domi_load##bits(const uint8_t *p) \
        { uint##bits##_t v; memcpy(&v, p, sizeof v); return DOMI_LITTLE(bits, v); } \
        static inline void domi_store##bits(uint8_t *p, uint##bits##_t v) \
        { v = DOMI_LITTLE(bits, v); memcpy(p, &v, sizeof v); }
    DOMI_LOAD_STORE(16)
    DOMI_LOAD_STORE(32)
    DOMI_LOAD_STORE(64)

    /* memcpy with a length of 0 may not be given NULL. Most lengths here are small: two loads
       and two stores that overlap cost less than a call. */
    static inline void domi_copy(void *to, const void *from, size_t n)
    {
        uint8_t *t = (uint8_t *)to;
        const uint8_t *f = (const uint8_t *)from;
        uint64_t first8, last8;
        uint32_t first4, last4;
        if (n > 32)
            memcpy(t, f, n);
        else if (n > 16) {
            memcpy(t, f, 16);
            memcpy(t + n - 16, f + n - 16, 16);
        } else if (n >= 8) {
            memcpy(&first8, f, 8);
            memcpy(&last8, f + n - 8, 8);
            memcpy(t, &first8, 8);
            memcpy(t + n - 8, &last8, 8);
        } else if (n >= 4) {
            memcpy(&first4, f, 4);
            memcpy(&last4, f + n - 4, 4);
            memcpy(t, &first4, 4);
            memcpy(t + n - 4, &last4, 4);
        } else if (n) {
            t[0] = f[0];
            t[n / 2] = f[n / 2];
            t[n - 1] = f[n - 1];
        }
    }

    static inline uint64_t domi_monotonic(void)
    {
        struct timespec t;
        clock_gettime(CLOCK_MONOTONIC, &t);
        return (uint64_t)t.tv_sec * 1000000000ull + (uint64_t)t.tv_nsec;
    }

    /* Whether some microseconds may have passed since it last said so: where the processor counts
       cycles, that is asked at half the price of the clock. */
    static inline int domi_moment_passed(uint64_t *then)
    {
    #if defined(__x86_64__)
        uint64_t now = __builtin_ia32_rdtsc();
        if (now - *then < 8192)
            return 0;
        *then = now;
    #else
        (void)then;
    #endif
        return 1;
    }

    /* Live objects of the core, counted in debug builds only. */
    enum { LIVE_SESSION, LIVE_SEGMENT, LIVE_TAIL, LIVE_BIG, LIVE_TIMER, LIVE_RING, LIVE_KINDS };
    #ifdef DOMI_DEBUG
    static int64_t domi_live[LIVE_KINDS];
    #define DOMI_LIVE(kind, change) (domi_live[kind] += (change))
    #define DOMI_LIVE_COUNT(kind) (domi_live[kind])
    #define DOMI_IS_DEBUG 1
    #else
    #define DOMI_LIVE(kind, change) ((void)0)
    #define DOMI_LIVE_COUNT(kind) ((int64_t)0)
    #define DOMI_IS_DEBUG 0
    #endif
    """
    uint16_t load16 "domi_load16"(const uint8_t* p) noexcept
    uint32_t load32 "domi_load32"(const uint8_t* p) noexcept
    uint64_t load64 "domi_load64"(const uint8_t* p) noexcept
    void store16 "domi_store16"(uint8_t* p, uint16_t v) noexcept
    void store32 "domi_store32"(uint8_t* p, uint32_t v) noexcept
    void store64 "domi_store64"(uint8_t* p, uint64_t v) noexcept
    void copy "domi_copy"(void* to, const void* source, size_t n) noexcept
    uint64_t monotonic_ns "domi_monotonic"() noexcept nogil
    bint moment_passed "domi_moment_passed"(uint64_t* then) noexcept nogil
    enum:
        LIVE_SESSION
        LIVE_SEGMENT
        LIVE_TAIL
        LIVE_BIG
        LIVE_TIMER
        LIVE_RING
    void live "DOMI_LIVE"(int kind, int change) noexcept
    int64_t live_count "DOMI_LIVE_COUNT"(int kind) noexcept
    int IS_DEBUG "DOMI_IS_DEBUG"

cdef enum:
    HEADER = 8
    MAGIC = 2299
    MAX_MACHINES = 1024
    MAX_CHANNELS = 65536
    USER_FIRST = 50
    USER_LAST = 65499
    NO_MACHINE = 0xFFFF

# Library channels (channels.py says what each is for).
cdef enum:
    CH_NIL = 65500
    CH_HEARTBEAT_REPLY = 65501
    CH_HEARTBEAT = 65502
    CH_EXIT = 65503
    CH_PING = 65504
    CH_PONG = 65505
    CH_NODE_NAME = 65510
    CH_WELCOME = 65511
    CH_ANSWER = 65512
    CH_SUBSCRIPTIONS = 65513
    CH_GUEST_NAME = 65514
    CH_REJECT = 65515
    CH_RELAY = 65516
    CH_STATE = 65517
    CH_MEMORY = 65518
    CH_AUTH = 65519
    CH_LANE = 65520

# First byte of an extend of odd size, which only peers that offered it get (docs/protocol.md).
cdef enum:
    TAG_REQUEST = 1
    TAG_GUEST_CALL = 2
    TAG_PUBLISH = 3
    TAG_PIPELINE = 4
    TAG_GUEST_REPLY = 5

cdef enum:
    REQUEST_EXTEND = 13         # tag, u64 correlation, u32 remaining milliseconds
    ANSWER_EXTEND = 9           # u64 correlation, u8 status
    GUEST_CALL_EXTEND = 9       # tag, u16 machine id, u16 reply channel, u32 guest
    GUEST_REPLY_EXTEND = 5      # tag, u32 guest
    RELAY_EXTEND = 19           # verb, u16 channel, u16 to, u16 reply, u64 correlation, u32 ms
    REJECT_EXTEND = 5           # u8 status, u16 channel, u16 size of the refused extend

cdef enum:
    NO_DEADLINE = 0xFFFFFFFF

# How a request ended, as the ANSWER and REJECT frames say it.
cdef enum:
    STATUS_OK = 0
    STATUS_REMOTE_ERROR = 1
    STATUS_NO_SUBSCRIBER = 2
    STATUS_OVERLOADED = 3
    STATUS_PEER_LOST = 4
    STATUS_DEADLINE = 5
    STATUS_REFUSED = 6
    STATUS_CIRCUIT_OPEN = 7

cdef enum:
    VERB_NOTIFY = 1
    VERB_PUBLISH = 2
    VERB_CALL = 3
    VERB_REQUEST = 4
    VERB_PIPELINE = 5
    VERB_REPLY = 6

cdef enum:
    SUBSCRIBED_ALL = 0
    SUBSCRIBED_ADD = 1
    SUBSCRIBED_REMOVE = 2

# Whether a node takes new work; what a peer says of itself, and this node of itself.
cpdef enum:
    STATE_SERVING = 0
    STATE_PAUSED = 1
    STATE_DRAINING = 2

cdef enum:
    STATE_SAID = 0              # of the sender
    STATE_HEARD = 1             # of the receiver, who had said so

cdef enum:
    SESSION_MAGIC = 0           # an accepted connection that has yet to show the magic
    SESSION_EXAMINED = 1        # has named itself; the mesh has yet to decide about it
    SESSION_NAMED = 2           # has been welcomed; its subscriptions complete the handshake
    SESSION_DIALLED = 3         # waits for the welcome, or to be taken as a lane
    SESSION_WELCOMED = 4        # has dialled, and waits for its lanes
    SESSION_LANE = 5            # a lane whose session is not up yet
    SESSION_UP = 6
    SESSION_CLOSED = 7

cpdef enum:
    ROLE_DIALLER = 0
    ROLE_ACCEPTOR = 1
    ROLE_GUEST = 2              # a guest, seen from its node
    ROLE_UPLINK = 3             # the node, seen from its guest
    ROLE_LOOPBACK = 4

cdef enum:
    KIND_NOTIFY = 0
    KIND_CALL = 1
    KIND_REQUEST = 2
    KIND_PIPELINE = 3
    KIND_PLAIN = 4              # from a peer without extensions: a call or a pipeline
    KIND_GUEST_CALL = 5
    KIND_UNFIT = 6              # an extend that fits no verb

cdef enum:
    SERIAL_NEW = 0
    SERIAL_RUNNING = 1
    SERIAL_CLOSING = 2          # takes nothing more, and runs what its ring holds
    SERIAL_CLOSED = 3

cdef enum:
    REQUEST_PENDING = 0
    REQUEST_DONE = 1
    REQUEST_FAILED = 2
    REQUEST_CANCELLED = 3

# What is done with a message for a peer whose queue is full.
cdef enum:
    FULL_RAISE = 0
    FULL_DROP_OLDEST = 1
    FULL_DROP_NEWEST = 2
    FULL_DISCONNECT = 3

# What comes of one.
cdef enum:
    FRAME_DROPPED = 0
    FRAME_FITS = 1
    FRAME_REFUSED = 2

cdef enum:
    TIMER_ONCE = 0
    TIMER_PERIODIC = 1
    TIMER_REQUEST = 2
    TIMER_SESSION = 3

cdef enum:
    RECEIVE_SIZE = 65536        # bytes asked of one recv
    RECEIVE_BUFFER = 131080     # RECEIVE_SIZE behind the longest tail
    SMALL = 464                 # a segment for what an empty queue gets first: 512 with its head
    SMALLS_KEPT = 2048          # free ones kept for the next burst
    CHUNK = 32768               # a segment for small frames
    CHUNKS_KEPT = 64            # the same of chunks
    BY_REFERENCE = 8192         # bytes objects of this size and more are sent in place
    BIG_FRAME = 16384           # an incomplete frame of this size is received in place
    FLUSH_AT = 65536            # queued bytes at which a burst is flushed before it ends
    MAX_VECTORS = 64            # of one sendmsg
    AUTH_LIMIT = 256            # largest frame before the peer is authenticated, where it has to be
    HANDSHAKE_LIMIT = 4096      # largest frame before the handshake is complete
    FAILURE_TEXT = 65536        # bytes of text in an error answer
    WARNINGS_A_SECOND = 20      # of sessions that were closed because of bad input
    ROOM_LEAST = 65536          # bytes that each session may queue, whatever the node has granted
    ROOM_STEP = 262144          # bytes that it is granted at a time
    DROP_COUNTS = 65536         # peers and channels whose dropped messages are counted apart
    LINGERS_MOST = 64           # connections of a node that were given up and are still open
    WASTES_A_TURN = 16          # times that one of them is read, of 16 KiB, before the loop goes on
    GUEST_REQUESTS = 65536      # in flight through a node for one guest
    BATCH_MOST = 256            # contexts that a handler of lists is given at once
    CONTEXT_WIRE = 48           # bytes of message and extend that a context holds itself
    ENDING_SLICE = 1000000      # nanoseconds for handshakes that took too long, and then
    ENDING_PAUSE = 1000000      # as many for all else
    CLOCK_EVERY = 16            # frames between two looks at the clock
    QUANTUM = 70000             # nanoseconds for which one session is served before the others, or
    LONG_QUANTUM = 400000       # after so many of them
    QUANTA_ALONE = 4            # of the same session, without another's between them
    FIRST_SLICE = 25000         # nanoseconds of one after which what was written goes out, and
    SLICE_GROWTH = 3            # so many times as much for each of the slices that follow
    SENDS_A_QUANTUM = 32        # system calls take about as long as one
    QUANTA_MOST = 64            # as long as which the node's own frames are delivered in one go
    LOOKS = 10                  # in which a serial thread that keeps going is seen to do so, by
    BUSY_PACE = 200             # so many records that it took, or
    BUSY_CPU = 5000000          # so many nanoseconds that it computed
    SLOW_RECORDS = 4096         # of one that waits, after which it may have become faster
    POLLS_ALONE = 64            # turns of a polling loop for one session, after which only it asks
    LOOKS_TO_YIELD = 16         # in vain, after which a polling loop lets another process run
    LOOKS_A_TURN = 64           # of a polling loop at its session, before it does all else
    SPINS_TO_YIELD = 64         # looks in vain after which a spinning thread lets others run

cdef uint64_t SLOW_EVERY = 10000000000ULL   # nanoseconds between two warnings of one slow peer
cdef double LINGER_TIME = 60.0      # seconds in which who was disconnected may read the rest
cdef double NEWEST_WEIGHT = 0.0625   # in the mean of the intervals between a peer's answers
cdef double LEAST_SPREAD = 0.25     # of that mean: their standard deviation, if it is not more
cdef double LOOK_EVERY = 0.01       # seconds, at least, between two of them
cdef uint64_t NEVER = <uint64_t>0xFFFFFFFFFFFFFFFFULL
