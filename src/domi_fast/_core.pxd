# cython: language_level=3
"""The map of the compiled core: every struct and field, who owns each pointer, who may touch it.

One thread rule covers everything below: all of it belongs to the thread that runs the event loop
(the *loop thread*), and is touched with the GIL held. The exceptions are said where they stand:
`Context`'s answering methods, which post to the loop thread from any other, and what a serial
thread has. Serial mode has a map of its own, which this one includes: `_serial.pxd`.

The parts, each built on those above it in this list (a timer that fires, and a flush, reach back
down to what they are for):

    frame.pxi        bytes <-> frames, pure
    write_queue.pxi  frames waiting to be sent, pure
    wheel.pxi        timers, pure
    engine.pxi       one a loop: receive buffer, wheel, sessions to flush, time slices
    driver.pxi       the descriptor: recv, sendmsg, reader and writer registration
    tls.pxi          the descriptor of a connection that is enciphered
    session.pxi      one connection: handshake state, flushing
    lanes.pxi        the connections of a session that has more than one
    heartbeat.pxi    heartbeats, and who is lost for its silence
    backlog.pxi      what waits for a slow receiver: how much may, and what then
    linger.pxi       a connection that was given up, until its peer has read the rest
    dispatch.pxi     Context and Request: one message each way
    status.pxi       how a message failed: statuses and exceptions
    routes.pxi       the router's table of who subscribes to what
    balance.pxi      who of several subscribers gets a message
    breaker.pxi      who gets none for a while
    verbs.pxi        the verbs, for whatever can send
    handlers.pxi     what becomes of a handler that was called
    delivery.pxi     from a frame to its handler, inline
    publish.pxi      one message to all who subscribe
    requests.pxi     awaited requests: the slots by which answers find their askers
    router.pxi       one a node: channels, peers, how each verb is sent
    control.pxi      the library's own channels
    batch.pxi        handlers of lists
    relay.pxi        guests: what a node does for clients that have no machine id
    serial.pxi       serial mode on the node's loop
    serial_thread.pxi  serial mode on a thread of its own
"""

from cpython.object cimport PyObject
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t

cdef extern from "sys/uio.h" nogil:
    cdef struct iovec:
        void* iov_base
        size_t iov_len


# ---------------------------------------------------------------------------------------- frames

cdef struct RawFrame:
    # One whole frame, seen in place. Valid until the reader is asked again.
    uint16_t channel
    uint16_t extend_size
    uint32_t size               # bytes of data
    const uint8_t* data         # borrowed: the receive buffer, the reader's tail, or `owner`
    const uint8_t* extend       # borrowed, likewise
    PyObject* owner             # strong, or NULL: the bytes object that `data` is the memory of.
                                # Whoever takes the frame takes this reference.


cdef class FrameReader:
    cdef:
        uint8_t* tail           # owned (malloc): bytes received and not yet parsed, or NULL
        size_t tail_size        # bytes in `tail`
        size_t tail_capacity
        const uint8_t* window   # borrowed: what is being parsed; inside `tail` or the caller's
        size_t position         # next byte of `window` to parse
        size_t end              # bytes in `window`
        bint window_is_tail
        PyObject* big           # strong, or NULL: the data of a large frame, received in place
        size_t big_size         # bytes of data that the large frame will have
        size_t big_have         # bytes of it that have arrived
        size_t proven           # bytes of the largest such data that has arrived whole
        uint16_t big_extend     # bytes of extend that follow its data
        uint16_t big_channel
        readonly uint32_t limit  # largest frame, in bytes, header included
        bint wants_magic        # the next four bytes are the dialler's magic
        const char* fault       # borrowed literal: why the bytes are refused, or NULL

    cdef int open_window(self, const uint8_t* data, size_t size) except -1
    cdef int open_tail(self) except -1
    cdef int close_window(self) except -1
    cdef int next(self, RawFrame* frame) except -1
    cdef int begin_big(self, uint32_t length, uint16_t extend_size, uint16_t channel,
                       size_t available) except -1
    cdef int grow_big(self, size_t arriving) except -1
    cdef int room(self, uint8_t* shared, size_t capacity, uint8_t** where,
                  size_t* size) except -1
    cdef int received(self, uint8_t* shared, size_t size) except -1
    cdef void drop(self) noexcept


# ----------------------------------------------------------------------------------- write queue

cdef struct Segment:
    # Whole frames only, starting at a frame boundary: so what was not sent can be named.
    Segment* next               # owned by the queue that holds the head
    PyObject* owner             # strong, or NULL: the bytes object whose memory is sent in place
    uint8_t* memory             # this segment's own bytes: follows the struct. With an owner: the
                                # header of the one frame, then its extend
    size_t capacity             # of `memory`
    size_t size                 # bytes of frames; with an owner header + data + extend
    size_t sent                 # bytes of `size` that the socket has taken


cdef struct SegmentPool:
    Segment* free               # owned chain
    size_t capacity             # of each of them
    int room                    # how many more may be kept


cdef class WriteQueue:
    cdef:
        Segment* head           # owned chain, oldest first
        Segment* last           # borrowed: the end of that chain
        readonly size_t queued  # bytes that are still to be sent
        size_t pinned           # bytes at its beginning that have to stay as they are
        size_t taken            # bytes of the first segment that take() has passed

    cdef int append_in_place(self, uint16_t channel, size_t size, const uint8_t* extend,
                             uint16_t extend_size, PyObject* owner) except -1
    cdef Segment* link(self, size_t capacity, bint exact) except NULL
    cdef int gather(self, iovec* vectors, int most) noexcept
    cdef void consume(self, size_t size) noexcept
    cdef void drop_first(self) noexcept
    cdef void clear(self) noexcept
    cdef object take(self)
    cdef dict droppable(self, int prefix)
    cdef dict drop_oldest(self, size_t wanted, int prefix, dict policies, int policy)


# ----------------------------------------------------------------------------------------- timers

cdef struct TimerNode:
    # Embedded in its owner; linked into one slot of the wheel while `next` is not NULL.
    TimerNode* next             # borrowed
    TimerNode* prev             # borrowed
    uint64_t expiry             # in ticks of the wheel
    uint16_t slot               # level * 64 + index
    uint16_t kind               # whose it is: TIMER_*


cdef struct OwnedNode:
    # Within a session or a request, which takes it out of the wheel before it dies.
    TimerNode node              # first: its address is that of the whole
    PyObject* owner             # borrowed: the object that embeds it


cdef class TimeWheel:
    cdef:
        TimerNode* slots        # owned (malloc): list heads, level by level
        uint64_t occupied[8]    # a bit a slot, a word a level
        TimerNode due           # list head: what the running advance() has still to fire
        uint64_t tick           # every slot up to and with this tick has been fired
        uint64_t resolution     # nanoseconds a tick
        uint64_t origin         # nanoseconds: tick 0 on the monotonic clock
        uint64_t last           # nanoseconds: the time of the last advance
        readonly size_t pending
        bint advancing

    cdef int put_off(self, Timer timer, uint64_t when_ns) except -1
    cdef Timer once(self, double when, object callback)
    cdef Timer start(self, uint64_t when_ns, object callback, uint16_t kind)
    cdef uint64_t ticks_at(self, uint64_t when_ns) noexcept
    cdef void add(self, TimerNode* node, uint64_t expiry) noexcept
    cdef void place(self, TimerNode* node) noexcept
    cdef void remove(self, TimerNode* node) noexcept
    cdef void cascade(self, int level) noexcept
    cdef uint64_t next_tick(self) noexcept
    cdef uint64_t next_ns(self) noexcept
    cdef int advance_within(self, uint64_t now_ns, uint64_t until_ns) except -1
    cdef int fire_due(self, int fired, uint64_t until_ns) except -1
    cdef Timer beat_from(self, uint64_t now_ns, double period, object callback)


cdef class Timer:
    # No vtable and not tracked by the collector, 64 bytes: a million of these may be pending. A
    # pending timer holds itself.
    cdef:
        TimerNode node          # first: its address leads to the timer
        PyObject* callback      # strong, a Beat if it is periodic; NULL once fired or cancelled
        PyObject* wheel         # borrowed while pending, otherwise NULL: a wheel that goes
                                # cancels its timers


cdef class Beat:
    cdef:
        object callback
        uint64_t due            # nanoseconds, on the wheel's clock: the next beat
        uint64_t period         # nanoseconds
        uint64_t missed         # beats before the latest that were left out


# ------------------------------------------------------------------------------------------- ring

cdef extern from "ring.h":
    ctypedef struct Ring "domi_ring":
        pass


cdef class RingBuffer:
    cdef:
        Ring* ring              # owned (ring_new); written by any thread through ring.h
        readonly uint64_t capacity  # bytes
        uint64_t most           # bytes of the largest frame that is copied into it
        bint lent               # a Borrowed has the oldest record

    cdef int put_bytes(self, const uint8_t* data, size_t size, bytes owner) except -1
    cdef int refuse(self, size_t size) except -1
    cdef int take(self, PyObject** frame) except -1
    cdef int check_lent(self) except -1


cdef class Borrowed:
    cdef:
        RingBuffer ring
        uint8_t* payload        # borrowed: the ring's oldest record, while it is lent
        uint32_t size
        int kind                # RING_FRAME, or RING_REFERENCE
        int exports             # buffers of it that somebody holds
        bint entered
        bint held               # within the block
        object view             # a weak reference to the memoryview that the block was given

    cdef int end(self) except -1
    cdef int give_back(self) except -1


# ----------------------------------------------------------------------------------------- engine

cdef class Ticker:
    # What has something to run before the present batch ends.
    cdef int tick(self) except -1


cdef class Taker(Ticker):
    # What stands in a router's table in place of a handler, and has frames wait for their turn.
    cdef int accept(self, Session session, RawFrame* frame) except -1


cdef class Engine:
    cdef:
        readonly object loop
        object call_soon        # the loop's bound method
        object call_soon_threadsafe
        readonly TimeWheel wheel
        uint8_t* buffer         # owned (malloc): the one receive buffer of all sessions here
        Context spare           # what the next message is shown in, once nobody has it; or None
        Session first_dirty     # a chain by next_dirty: the sessions that have something to flush
        Session last_dirty
        object finished         # a future that is done, with the result None
        object timer            # the loop's timer handle for the wheel, or None
        uint64_t timer_ns       # when that handle fires; 2**64-1 when there is none
        uint64_t now            # nanoseconds, monotonic: when the bytes or the timers that are
                                # being served came
        uint64_t quantum_end    # when the session that is served has had its quantum
        uint64_t slice_end      # the same of a slice of that, which is so many nanoseconds
        uint64_t slice_length   # long
        object ending           # a deque of sessions whose handshakes took too long
        object ender            # the loop's handle that ends some of them, or None
        PyObject* served        # the session that had the last: not owned, only compared
        int quanta              # that it has had in a row besides, up to QUANTA_ALONE
        int depth               # > 0 while frames are dispatched: no nested dispatch
        PyObject* parsed        # borrowed: the FrameReader whose window parse() is in, or NULL
        bint burst              # a flush is scheduled for this turn of the loop
        uint64_t published      # messages to all who subscribe, outside a batch, since the last;
        bint streaming          # the time before there were several
        uint64_t flushed        # sessions, in this flush or the last one
        uint64_t busy_ns        # how long to poll after the last traffic; 0: not at all
        list pollers            # what those who poll want `busy_ns` to be
        Session latest          # whose traffic was the last, while the loop polls
        int polls_alone         # turns since it has been, up to POLLS_ALONE
        uint64_t traffic        # nanoseconds: when that was,
        bint stirred            # unless there was some since poll() looked at the clock
        readonly uint64_t vain  # looks at it since then
        bint polling            # the loop is to call poll()
        bint turn_due           # what a message has started may wait for the loop's next turn
        readonly uint64_t polls  # turns of the loop in which it polled
        list ready              # of Tickers: what is to run before the batch ends
        unsigned long thread    # the loop thread
        readonly bint closed
        int users               # routers that share this engine

    cdef uint64_t refresh(self) noexcept
    cdef void begin_quantum(self, Session session) noexcept
    cdef bint slice_is_over(self, uint64_t now) except -1
    cdef int enter(self) except -1
    cdef int leave(self) except -1
    cdef bint handles_the_last(self) noexcept
    cdef int flush_dirty(self) except -1
    cdef int run_ready(self) except -1
    cdef int end_soon(self) except -1
    cdef bint start_polling(self, uint64_t busy_ns) except -1
    cdef int stop_polling(self, uint64_t busy_ns) except -1
    cdef int look_at(self, Session session) except -1
    cdef int poll_on(self, Session session) except -1
    cdef int mark_dirty(self, Session session) except -1
    cdef void queue_flush(self, Session session) noexcept
    cdef int arm(self) except -1
    cdef int end_later(self, Session session) except -1
    cdef uint64_t schedule(self, TimerNode* node, uint64_t delay_ns) except 0
    cdef int abandon(self) except -1
    cdef int check_thread(self) except -1


# ---------------------------------------------------------------------------------------- session

cdef class SocketDriver:
    cdef:
        Engine engine
        readonly int fd         # owned: detached from its socket object; -1 once closed
        bint reading            # registered with the loop; unless
        bint unwatched          # that is put off, while somebody asks by hand
        bint writer             # a writer is registered with the loop
        bint writing            # the kernel's buffer is full: wait for the writer
        object fault            # a DomiError behind an EPROTO: what is wrong with the peer; or None
        object certificate      # what its certificate says, as getpeercert() has it; None without
        object binding          # bytes that both ends have of this connection, and nobody of
                                # another; None without
        bint heard              # bytes have come, though perhaps nothing of a frame
        uint32_t unread         # bytes that lay in a Unix socket when that was looked at, of those
                                # that have come since nothing is read
        object __weakref__

    cdef int begin(self, bytes first) except -1
    cdef Py_ssize_t recv(self, uint8_t* where, size_t size) except -4096
    cdef Py_ssize_t send(self, WriteQueue queue) except -4096
    cdef int want_read(self, object callback) except -1
    cdef int stop_read(self) except -1
    cdef int unwatch(self) except -1
    cdef int watch(self, object callback) except -1
    cdef int want_write(self, object callback) except -1
    cdef int stop_write(self) except -1
    cdef int release(self) except -2
    cdef int half_close(self) except -1
    cdef int close(self) except -1


cdef class TlsDriver(SocketDriver):
    cdef:
        object tls              # an ssl.SSLObject, between the two next: ssl.MemoryBIO
        object incoming         # what has come and is not deciphered
        object outgoing         # what is enciphered and has not been sent: empty between calls
        bint secure             # the handshake is complete, and the peer's certificate good
        bint enciphering        # the ssl module has the next record
        size_t silent           # bytes that have come since the last plain text
        bytes first             # what is to be said first; None once it is
        object waiting          # called once `secure`, by who wants to send; or None
        bytes record            # the record that is being sent; or None
        size_t record_sent      # bytes of it that the kernel has
        size_t plain            # bytes of the queue that it stands for

    cdef int wrap(self, context, bint server_side) except -1
    cdef int shake(self) except -1
    cdef int push(self) except -1
    cdef Py_ssize_t decipher(self, uint8_t* where, size_t size) except -4096
    cdef int encipher(self, WriteQueue queue) except -1


cdef class Session:
    cdef:
        # What sending looks at comes first, as far as `extended`: it is fetched of many in a row.
        Engine engine
        Router router           # None once closed: what still holds the session holds no node
        WriteQueue queue
        SocketDriver driver     # None: this is the node's session with itself
        list lanes              # all connections of this session by their numbers, itself the
                                # first, None where one is missing yet; None: there is but this
        size_t gate             # bytes that may be queued without a closer look, which are `room`;
                                # 0 while a request waits for room, and once the peer is going
        readonly uint64_t frames_out, bytes_out
        int state               # SESSION_*
        bint dirty              # stands in the engine's chain of sessions to flush
        bint limited            # `limiter` or the router's has a say
        bint extended           # the peer understands what the original does not
        Session next_dirty
        FrameReader reader
        object on_readable      # bound methods, made once: registering them again costs nothing
        object on_writable
        OwnedNode heartbeat     # TIMER_SESSION, in the engine's wheel
        uint64_t last_heard     # nanoseconds
        int role                # ROLE_*
        bint counted            # among the live objects of a debug build
        bint continuing         # a call_soon continuation of reading is under way; or `holding`
        bint holding            # nothing is read or parsed until go_on_reading()
        size_t unparsed         # bytes of the open window that hold_reading() has hidden
        bint cut_short          # the reader's tail holds whole frames: the time was up
        int broken              # errno of a failed send, until the stream has been read to its end
        uint64_t beat_due       # nanoseconds: when the next heartbeat goes out
        bint asked              # a heartbeat went out, and none was answered since
        uint64_t last_answer    # nanoseconds: when the peer has answered one; 0: never
        double interval_mean    # seconds between its answers, the newest weighing most
        double interval_variance
        Session main            # of a lane: the session that it is one of; otherwise None
        bint parted             # the peer has ended this connection; others are still read
        readonly str parting    # why the peer has ended one of the connections, once it has: of a
                                # lane, its main one says
        Timer parting_timer     # ends the others in the end; or None
        uint32_t states_in      # times that the peer has said on this connection what its state is
        uint32_t states_known   # on all of them: as many of those as it has gone by
        bint draining           # above the low water mark: somebody waits for room
        readonly int peer       # machine id; -1 for a guest or before the handshake
        uint32_t relayed        # requests in flight through this node that it waits for
        uint32_t owed           # requests whose handlers have returned without an answer
        Breaker breaker         # None for guests, loop-back, and where there is none
        Limiter limiter         # of what is sent to this peer; or None
        bint looking            # a timer is to call look_for_room()
        readonly Candidate candidate    # None for guests, and before the handshake is complete
        readonly int state_of_peer  # STATE_*: whether it takes new work
        readonly uint32_t unheard   # times that it was told of this node's state, and has not said
                                    # that it knows
        readonly uint32_t token  # guests: the number by which answers find them
        readonly object guard   # authenticates the peer before anything else; None: nobody has to,
                                # or the handshake is complete
        tuple naming            # the first frame, while it waits for that; or None
        public object info      # what the mesh knows of the peer
        readonly str address    # for people
        readonly str reason     # why it was closed, or None
        readonly uint64_t frames_in, bytes_in
        uint64_t beats_in       # heartbeats and pings, which do not keep a loop polling
        uint64_t frames_flushed  # `frames_out` when something was sent the last time
        list room_waiters       # (bytes, future) of drained()
        size_t room             # bytes that may be queued: ROOM_LEAST, and what was granted of the
                                # node's
        int when_full           # FULL_*: on channels that have none of their own
        object waiting          # a deque of Waiting: requests for which there was no room; or None
        size_t waiting_bytes    # of their frames
        Py_ssize_t ended_waiting    # of `waiting`, whose requests have ended
        bint slow               # its queue was full, and it has not caught up since
        uint64_t slow_told      # nanoseconds: when that was told the last time; 0: never
        int drop_channel        # of the frames that were dropped last,
        uint64_t dropped        # and how many that have not been counted yet
        tuple full_text         # what the last error said that it was full, or None; that is with
        str full_advice         # this advice at the end,
        size_t full_queued      # of so many bytes in the queue,
        bint full_node          # and whether that was more than the node may queue
        set channels            # what the peer subscribes to
        bint announced          # the peer's subscriptions are known
        object __weakref__

    cdef bint find_room(self, uint16_t channel, size_t length, const uint8_t* extend,
                        uint16_t extend_size) except -1
    cdef int has_flushed(self) except -1
    cdef bint is_drained(self, size_t limit, double wait) noexcept
    cdef int refuse_rate(self, uint16_t channel) except -1
    cdef int put(self, uint16_t channel, object data, const uint8_t* extend,
                 uint16_t extend_size) except -1
    cdef int put_view(self, uint16_t channel, object data, const uint8_t* extend,
                      uint16_t extend_size) except -1
    cdef int flush(self) except -1
    cdef int flush_local(self) except -1
    cdef int parse(self) except -1
    cdef int read_batch(self) except -1
    cdef int read_some(self) except -1
    cdef int handshake_frame(self, RawFrame* frame) except -1
    cdef int authenticate(self, int channel, bytes data, bytes extend) except -1
    cdef bint is_guarded(self) except -1
    cdef int say_name(self) except -1
    cdef int answer_is_lost(self, uint64_t correlation) noexcept
    cdef int control(self, uint16_t channel, bytes data) except -1
    cdef int put_failure(self, uint16_t channel, bytes data, const uint8_t* extend,
                         uint16_t extend_size) except -1
    cdef int stop_for(self, Py_ssize_t result) except -1
    cdef str end_of_stream(self)
    cdef bint is_private(self) except -1
    cdef int send_failed(self, int error) except -1
    cdef int goodbye(self, str reason) except -1
    cdef int go_on(self) except -1
    cdef int hold_reading(self) except -1
    cdef int read_no_more(self) except -1
    cdef int go_on_reading(self) except -1
    cdef int rise(self) except -1
    cdef int take_lane(self, bytes data, bytes extend) except -1
    cdef int fail(self, object reason, bint protocol=*) except -1
    cdef int wake_drained(self) except -1
    cdef int look_again(self, double wait) except -1
    cdef object lost_error(self)


cdef class Waiting:
    cdef:
        Request request         # None once it is sent or has ended
        int channel
        bytes data              # None then
        object to               # as it was given
        uint64_t since          # nanoseconds
        size_t size             # bytes of its frame


cdef class Linger:
    cdef:
        Router router           # None once it has ended
        SocketDriver driver     # owns the descriptor
        int peer                # machine id; -1: a guest
        object info             # of its session
        Timer timer             # of its latest end


# --------------------------------------------------------------------------------------- messages

cdef class Unanswered:
    cdef:
        Session session
        uint64_t correlation
        bint owed               # neither answered nor about to be
        bint counted            # in the session's `owed`: not answered


cdef class Context:
    cdef:
        Session session         # where it came from
        bytes whole             # the message; None until somebody wants it, if `wire` holds it
        bytes long_extend       # the extend, when `wire` has no room for it
        Unanswered unanswered   # a request that outlives its handler's call; otherwise None
        bint held               # one of the last three is not None
        uint32_t size           # bytes of the message, when `wire` holds it
        readonly uint16_t channel
        uint16_t extend_size
        uint8_t extend_at       # where the extend begins, in `wire` or in `long_extend`
        uint8_t kind            # KIND_*: how it may be answered
        bint answered
        bint posted             # another thread has answered; the loop thread will send it
        int origin              # guests: the machine id that stands in the extend; else -1
        uint64_t expires        # nanoseconds, monotonic; 0: no deadline
        uint8_t wire[48]        # CONTEXT_WIRE: a small message and its extend, as they came

    cdef void let_go(self) noexcept
    cdef bint is_owed(self) noexcept
    cdef int expect_answer(self) except -1
    cdef void set_answered(self) noexcept
    cdef const uint8_t* extend_bytes(self) noexcept
    cdef Router router(self)
    cdef int reply_now(self, object data) except -1
    cdef int claim(self) except -1
    cdef int refuse_second(self) except -1
    cdef int check_reply(self) except -1
    cdef uint16_t check_next(self) except 1
    cdef int check_error(self) except -1
    cdef bint is_foreign(self) except -1
    cdef bint check_foreign(self) except -1
    cdef object foreign(self, str name, object argument)
    cdef int answer(self, uint8_t status, object data) except -1
    cdef int answer_channel(self, uint16_t channel) except -1
    cdef int reply_to_address(self, object data) except -1
    cdef int reply_to_guest(self, object data) except -1


cdef class Request:
    cdef:
        Engine engine
        Router router           # None once settled
        Session session         # whom it was sent to; None once settled
        OwnedNode deadline      # TIMER_REQUEST, in the engine's wheel
        uint32_t milliseconds   # the deadline as the wire has it
        uint64_t correlation    # 0 once settled
        int state               # REQUEST_*
        readonly uint16_t channel
        bint blocking           # asyncio's _asyncio_future_blocking
        object result_value     # the answer, or the exception
        object callback         # the first done callback and its context
        object context
        list more               # further (callback, context)
        Session origin          # a relayed request: who wants the answer, otherwise None
        uint64_t origin_correlation
        Candidate candidate     # whose outstanding it is one of; None for a guest's
        Waiting waiting         # while it waits for room to be sent; otherwise None
        uint64_t began          # nanoseconds: when it was sent; 0 where latencies are of no use
        double timeout

    cdef int settle(self, int state, object value, bint inline_wake) except -1
    cdef int release(self, bint answered=*) except -1
    cdef int measure(self, bint answered) except -1
    cdef int expire(self) except -1
    cdef int callback_raised(self, object callback) except -1
    cdef object cancelled_error(self)


# ----------------------------------------------------------------------------------------- router

cdef struct Route:
    # The subscribers of one channel among the connected peers, this node among them.
    PyObject** members          # owned array of borrowed sessions: a session leaves every route
                                # before it dies
    PyObject** candidates       # the same array goes on: the Candidate of each of them, borrowed
    uint32_t count
    uint32_t capacity
    uint32_t cursor             # round robin


cdef struct ChannelEntry:
    PyObject* handler           # strong, or NULL
    Route* route                # owned, or NULL
    Route* guests               # owned, or NULL: guests of this node that subscribe to it
    bint takes                  # the handler is a Taker
    bint direct                 # a user's channel whose messages go to the handler and nobody else


cdef class Candidate:
    cdef:
        readonly object id
        double share            # the weight
        public int64_t outstanding
        public double memory
        uint64_t seed           # of its id, the same in every process
        double latency_ns
        uint64_t seen           # nanoseconds: when it has answered last; 0: never

    cdef int answered_in(self, double latency, uint64_t now) except -1
    cdef double cost(self, uint64_t now) noexcept


cdef class CorePolicy:
    cdef Py_ssize_t index(self, PyObject** some, Py_ssize_t count, bytes key) except -1


cdef class RoundRobin(CorePolicy):
    cdef uint64_t turn


cdef class WeightedRoundRobin(CorePolicy):
    cdef dict credit            # id -> float: what it has gained and not paid


cdef class RandomPolicy(CorePolicy):
    cdef uint64_t state

    cdef uint64_t bits(self) noexcept
    cdef Py_ssize_t below(self, Py_ssize_t count) noexcept


cdef class KeyHash(CorePolicy):
    cdef readonly bint by_address


cdef class LeastConnections(CorePolicy):
    cdef uint64_t turn


cdef class LeastMemory(CorePolicy):
    cdef uint64_t turn


cdef class UserPolicy(CorePolicy):
    cdef object policy


cdef class Breaker:
    cdef:
        int state               # CIRCUIT_*
        Py_ssize_t most         # failures that open it
        uint64_t* times         # owned (calloc): nanoseconds, when the latest of them were; NULL
                                # before the first
        Py_ssize_t at           # where the next is noted, over the oldest
        uint64_t count          # failures since it was closed
        object timer            # of the next probe, while it is not closed

    cdef bint fails(self, uint64_t now, uint64_t window) except -1
    cdef int forget(self) except -1


cdef class Limiter:
    cdef:
        double rate             # bytes a nanosecond
        double size             # bytes
        double tokens           # bytes that may pass; below 0 when a frame took more than there was
        uint64_t filled         # nanoseconds: when it was filled the last time

    cdef int fill(self) except -1
    cdef double wait(self) except -1.0


cdef class Verbs:
    cdef int send_notify(self, int channel, object data, object to, bint keyless) except -1
    cdef int send_publish(self, int channel, object data, object to) except -1
    cdef int send_call(self, int channel, object data, int reply, object to,
                       bint keyless) except -1
    cdef object send_request(self, int channel, object data, object timeout, object to)
    cdef int send_stages(self, list channels, object data) except -1
    cdef object chosen(self, int channel, object to, object key, object policy)


cdef class Router(Verbs):
    cdef:
        Engine engine           # None before the start
        readonly int id         # machine id; -1 before the start
        readonly int state      # STATE_*: whether it takes new work
        ChannelEntry* channels  # owned (calloc): one a channel, 65536
        PyObject** peers        # owned (calloc): strong sessions by machine id, 1024
        PyObject** slots        # owned (malloc): strong requests in flight, by the low bits of
                                # their correlation; NULL where a slot is free
        uint64_t* generations   # owned (malloc): the high bits of the next correlation of a slot
        uint32_t* free_slots    # owned (malloc): a stack of slots that are free
        uint32_t slot_count
        uint32_t free_count
        Session loopback        # this node's session with itself
        Session uplink          # a guest's session with its node, otherwise None
        str uplink_lost         # why that session is gone
        str stopped             # why no subscription is taken any more, otherwise None
        dict guests             # token -> Session
        uint32_t next_token
        object mesh             # what decides about handshakes and hears of losses
        Py_ssize_t breaker_failures     # that open a circuit; 0: none does
        uint64_t breaker_window     # nanoseconds
        uint64_t breaker_pause      # nanoseconds before a probe
        Limiter limiter         # of what is sent to all peers; or None
        double peer_rate, peer_size     # bytes: of each peer's limiter; 0: it has none
        bint balanced           # `policy` is set, or one of `policies`
        bint measures           # latencies are of use: somebody has named a policy
        dict policies           # channel -> CorePolicy
        object policy           # of all other channels, as it was given; None: round robin
        dict default_policies   # channel -> CorePolicy: `policy` at the channels where it was used
        KeyHash by_key          # for a key on a channel without a policy
        dict named_policies     # (channel, name) -> CorePolicy: what single messages have named
        public bytes own_address  # the key of ip_hash; or None
        int own_memory          # thousandths that are used of this node's memory; -1: not said
        public object on_error  # callable(exc, frame) or None
        bint telling            # it publishes, on the loop, and hears of no refusal
        uint64_t heartbeat_ns
        uint64_t silence_ns
        double phi_deviations   # of a silence that is too long; infinite: silence_ns alone decides
        uint64_t handshake_ns
        uint64_t busy_ns
        double timeout          # seconds: default of request()
        set tasks               # of async handlers that have not finished
        size_t queue_limit      # bytes that a session may queue
        size_t node_queue_limit  # bytes that all sessions may, beyond ROOM_LEAST of each
        size_t granted          # bytes of that which sessions have as room
        list short_of_room      # sessions that wait for some
        uint32_t channel_limit  # channels that are subscribed here, or by one peer
        uint32_t subscriber_limit   # guests that subscribe to one channel
        uint32_t handler_count  # channels that have a handler
        uint32_t handler_limit  # of `tasks`
        int full_default        # FULL_*: of sessions that have none of their own
        dict full_channels      # channel -> FULL_*
        dict full_peers         # machine id -> FULL_*
        dict drop_counts        # (machine id, channel) -> frames that were dropped, but for those
                                # that sessions have not been asked for yet
        uint64_t refused        # frames that were refused because a queue was full, since that was
                                # counted the last time
        list lingering          # Lingers, the oldest first
        public double linger_time   # seconds that each may last
        size_t low_water
        uint32_t frame_limit
        dict totals             # counters by name
        uint64_t second         # the clock's, for which the next two count
        int said                # warnings of sessions that were closed because of bad input
        int unsaid              # such sessions without a warning
        list reporters          # ThreadSchedulers, on the last of whose threads on_error runs; if
                                # there is none, on the loop thread
        bint polls              # has its engine poll
        uint64_t frames_in, frames_out, bytes_in, bytes_out

    cdef int forget_handlers(self) except -1
    cdef int install(self, int number, object handler) except -1
    cdef int uninstall(self, int number) except -1
    cdef object choose_peer(self, int channel, object to, object key, object policy)
    cdef int check_open(self) except -1
    cdef int require_engine(self) except -1
    cdef int check_running(self) except -1
    cdef Session session_to(self, object machine)
    cdef Session pick_named(self, int number, object to)
    cdef int send_stage(self, int channel, object data, const uint8_t* rest,
                        uint16_t size) except -1

    cdef int deliver(self, Session session, RawFrame* frame) except -1
    cdef int deliver_rare(self, Session session, RawFrame* frame) except -1
    cdef int run_handler(self, ChannelEntry* entry, Session session, RawFrame* frame) except -1
    cdef int reject_context(self, Context context, uint8_t status) except -1
    cdef int reject(self, Session session, uint8_t status, RawFrame* frame) except -1
    cdef int report(self, object error, object frame) except -1
    cdef int tell(self, object error, object frame) except -1
    cdef int count(self, str name, uint64_t by=*) except -1
    cdef int add_up(self) except -1

    cdef int peers_set(self, int machine, Session session) except -1
    cdef int peers_clear(self, Session session) except -1
    cdef int attach(self, Session session) except -1
    cdef int warn_of(self, Session session) except -1
    cdef int session_lost(self, Session session, bint was_up, bint protocol,
                          WriteQueue unsent) except -1


cdef class BatchChannel(Taker):
    # For a handler that takes lists.
    cdef:
        Router router
        object handler
        int channel
        list contexts           # what the present batch has brought
        bint asked              # one of them is a request
        bint waiting            # stands in the engine's list

    cdef int run(self) except -1


cdef class TaskCompletion:
    cdef:
        Router router
        Context context


include "_serial.pxd"
