# cython: language_level=3
"""The map of serial mode in the compiled core, a part of `_core.pxd`."""

# ----------------------------------------------------------------------------------------- serial

cdef struct Parcel:
    # What every record of a scheduler's ring begins with.
    PyObject* origin            # strong: the whole context; of an Arrival, the session
    PyObject* intake            # strong: the SerialChannel that took it


cdef struct Reference:
    # A record of kind RING_REFERENCE.
    Parcel parcel
    uint64_t size               # bytes of its message, which the ring counts as owned


cdef struct Arrival:
    # A record of kind RING_FRAME; the data and the extend of its frame follow.
    Parcel parcel
    uint64_t time               # nanoseconds, monotonic: when the frame came
    uint32_t size
    uint16_t channel
    uint16_t extend_size


cdef class JoinContext:
    cdef:
        readonly tuple channels
        readonly tuple requests


cdef class SerialGroup:
    cdef:
        tuple channels          # ints, in the order given
        object handler
        list queues             # a deque of contexts a channel; None for what is no join
        Py_ssize_t max_pending
        Py_ssize_t missing      # queues that are empty
        list batch              # contexts until the next tick, and behind them those that nobody
                                # has, for what comes; None for what takes no lists
        Py_ssize_t waiting      # how many the former are
        bint asked              # one of them is a request
        bint listed             # stands in the scheduler's batches

    cdef int join(self, Router router, int place, Context context) except -1
    cdef int add(self, Context context) except -1
    cdef list take_batch(self)
    cdef int give_back(self, list contexts) except -1


cdef class SerialChannel(Taker):
    # For a channel of serial mode, which has no turn of its own.
    cdef:
        Scheduler scheduler
        SerialGroup group       # None once it was unsubscribed
        object handler          # of a group that takes each message by itself; None for others
        int channel
        int place               # of the channel in the group

    cdef int put_frame(self, Session session, RawFrame* frame) except -1
    cdef bint has_put(self, Session session, RawFrame* frame) except -1
    cdef bint has_put_context(self, Context context, size_t size) except -1
    cdef int run(self, Context context) except -1


cdef class Scheduler(Ticker):
    # The loop thread puts into the ring; the rest is the serial thread's. Where the two differ, the
    # loop thread changes groups, intakes and the wheel too: with the GIL held, and only where a
    # handler could have done the same. The GIL changes hands where Python code runs, which may be a
    # finalizer, wherever the collector does (before 3.12: at any allocation).
    cdef:
        Router router
        Engine engine           # None before the start
        Ring* ring              # owned (ring_new)
        uint64_t ring_bytes     # its capacity
        dict intakes            # channel -> SerialChannel
        uint64_t most           # bytes of data and extend that are copied into the ring
        readonly TimeWheel wheel
        list groups
        int state               # SERIAL_*
        uint64_t drain_ns
        uint64_t timer_ns
        uint64_t spin_ns
        str name
        uint64_t now            # nanoseconds: when the last tick began with the timers
        Py_ssize_t max_pending
        bint spins              # polls, or has its engine poll
        readonly uint64_t polls  # looks of a thread that polls
        Context spare           # what the next message is shown in, once nobody has it; or None
        list batches            # groups whose `batch` has something
        object emptied          # a future of stop_taking(), until there is nothing left; or None
        bint ready              # stands in the engine's list
        bint ticking
        bint spilled            # what comes waits beside the ring: written by the loop thread
        bint at_once            # who brings a message runs it, if nothing waits before it: not
                                # while the loop is to call resume()
        bint called             # a handler, since the clock was looked at
        bint begun              # a handler has run in this batch before the tick at its end
        list early              # (timer, nanoseconds) that were set before the start, from which
                                # on their time runs
        uint64_t moment         # of moment_passed()

    cdef int check_caller(self) except -1
    cdef int on_loop(self, object function, tuple arguments) except -1
    cdef int arm(self) except -1
    cdef int abandon(self, list contexts) except -1
    cdef int overflow(self, SerialChannel intake, Session session, RawFrame* frame) except -1
    cdef int drain_spill(self, uint64_t until) except -1
    cdef int check_new(self, str verb) except -1
    cdef int check_not_closed(self) except -1
    cdef int add_group(self, tuple channels, object handler, bint all_of_them,
                       bint batch) except -1
    cdef bint is_leaving(self, int number) except -1
    cdef int remove_group(self, SerialGroup group) except -1
    cdef int open(self) except -1
    cdef int close(self) except -1
    cdef int take_no_more(self) except -1
    cdef int end(self) except -1
    cdef int check_timers(self) except -1
    cdef Timer begun_timer(self, Timer timer, double delay)
    cdef int awaken(self) except -1
    cdef bint has_work(self) noexcept
    cdef int run_tick(self, uint64_t until) except -1
    cdef int run_batches(self, uint64_t until) except -1
    cdef int run_batch(self, SerialGroup group) except -1
    cdef bint fire_timers(self, uint64_t now) except -1
    cdef int drain(self, uint64_t until) except -1
    cdef int run_arrival(self, uint8_t* payload, uint32_t size, int kind) except -1
    cdef int refuse(self, Session session, RawFrame* frame) except -1
    cdef bint drop_record(self) noexcept


cdef class LoopScheduler(Scheduler):
    cdef:
        int timer_fd            # owned: the kernel's timer; -1 unless it runs
        uint64_t armed          # nanoseconds: when it expires; NEVER when it does not
        bint resuming           # the loop is to call resume()
        uint64_t until          # nanoseconds: the end of the ring's turn in the present batch

    cdef int take_now(self, SerialChannel intake, Session session, RawFrame* frame) except -1
    cdef int take_turn(self) except -1
    cdef int resume_soon(self) except -1
    cdef int after_tick(self) except -1


# --------------------------------------------------------------------------------- serial, threaded

cdef struct Departure:
    # A record of an Outbound's ring, of kind RING_FRAME; data of `size` bytes follows. The other
    # kind, RING_REFERENCE, is a strong reference to a tuple (function, arguments).
    PyObject* context           # strong: the message that this answers; or NULL
    PyObject* whole             # strong: the bytes object that is the data; or NULL. Its bytes are
                                # counted as owned
    uint32_t size
    int to                      # machine id; -1 when it is for any subscriber
    uint16_t channel
    uint16_t reply
    uint8_t verb                # VERB_*
    uint8_t quiet               # `on_error` publishes it, and hears of no refusal


cdef class Outbound(Verbs):
    # The serial thread puts into the ring, the loop thread takes out of it.
    cdef:
        ThreadScheduler scheduler
        Router router
        Engine engine           # None before the start
        Ring* ring              # owned (ring_new)
        uint64_t most           # bytes of data that are copied into the ring
        bint telling            # `on_error` runs, on the serial thread
        object late             # a deque of (function, arguments): calls for which the ring had no
                                # room, and behind which nothing goes into the ring
        int wake_fd             # owned: an eventfd by which the loop thread is woken; or -1

    cdef bint is_here(self) except -1
    cdef bint check_node(self) except -1
    cdef int check_route(self, int channel, object to, bint keyless) except -1
    cdef int check_size(self, int channel, size_t size) except -1
    cdef uint8_t* claim(self, uint32_t size, size_t owned) except? NULL
    cdef uint8_t* try_to_claim(self, uint32_t size, size_t owned) except? NULL
    cdef object full(self, int channel)
    cdef bint put_call(self, object function, tuple arguments) except -1
    cdef int ask_loop(self, int channel, object function, tuple arguments) except -1
    cdef int put(self, uint8_t verb, int channel, int reply, object to, object data,
                 Context context) except -1
    cdef int wake(self) except -1
    cdef int on_loop(self, object function, tuple arguments) except -1
    cdef int open(self, Engine engine) except -1
    cdef int close(self) except -1
    cdef bint is_empty(self) except -1
    cdef int rest(self) except -1
    cdef int drain(self) except -1
    cdef int depart(self, uint8_t* payload, uint32_t size, int kind) except -1
    cdef bint drop_record(self) noexcept


cdef class ThreadScheduler(Scheduler):
    cdef:
        Outbound outbound
        object thread           # None before the start
        object posts            # a deque of (function, arguments), appended to by any thread
        int wake_fd             # owned: an eventfd by which the serial thread is woken; or -1
        uint64_t traffic        # nanoseconds: when there was something to run the last time
        bint was_left           # nobody waits for its end: what it holds goes with it
        object spill            # a deque of (SerialChannel, Context): what came while the ring was
                                # full, one message of each session that is held
        list held               # sessions that read no more until there is room: the loop's
        Timer patience          # looks whether the thread keeps going, while any is held; or None
        int looks               # in vain, since it was last seen to keep going; then it had taken
        uint64_t seen_gets      # so many records out, and
        uint64_t seen_cpu       # computed for so many nanoseconds
        int cpu_clock           # the clock of what it computes, or -1 before it has begun
        bint asked              # the loop is to call make_way()
        uint64_t slow_until     # records taken out before a session is held again
        bint has_ended          # the thread has called its last handler

    cdef bint is_here(self) noexcept
    cdef int wake(self) except -1
    cdef int stop_reporting(self) except -1
    cdef int raised(self, object error) except -1
    cdef int hold(self, Session session) except -1
    cdef int see_pace(self) except -1
    cdef int ask_for_way(self) except -1
    cdef int release(self) except -1
    cdef bint has_room(self) noexcept
    cdef int run_posts(self) except -1
    cdef int wait(self) except -1
    cdef bint spin(self, uint64_t due) except -1
