# One engine a loop: the receive buffer, the wheel and the sessions that wait for a flush.
#
# A *batch* is what one wake-up of the loop does: enter(), frames are dispatched, leave() flushes
# every session that was written to. Outside a batch the first write of a loop turn goes out at
# once and the rest together at the turn's end (a *burst*).
#
# Sessions are served by turns, each for a *quantum*, which is cut into *slices* that grow: what was
# written goes out at the end of each, so that the peer has something to do meanwhile.
#
# A loop that polls (`busy_poll`) comes round without blocking for as long as there was traffic a
# short while ago: each time the loop looks at every descriptor, and the engine at that of the
# latest session by hand. One that has been the latest for a while is looked at by hand only. While
# it polls, what a handler upon whose frame nothing follows sends first goes out at once. Messages
# upon which less was sent than came may have made work for the loop, which has its turn first.
#
# Invariants: no dispatch inside a dispatch (depth); the receive buffer is used by one session at a
# time and never across an await. Owned by the loop thread.

cdef dict engines = {}              # loop -> engine, while a router uses it


cdef class Ticker:
    cdef int tick(self) except -1:
        raise NotImplementedError


cdef class Taker(Ticker):
    cdef int accept(self, Session session, RawFrame* frame) except -1:
        raise NotImplementedError


@cython.final
cdef class Engine:
    """What all nodes and clients of one event loop share. Get it with :func:`engine_of`."""

    def __cinit__(self, loop):
        self.loop = loop
        self.call_soon = loop.call_soon
        self.call_soon_threadsafe = loop.call_soon_threadsafe
        self.buffer = <uint8_t*>malloc(RECEIVE_BUFFER)
        if self.buffer is NULL:
            raise MemoryError
        self.now = monotonic_ns()
        self.wheel = TimeWheel(0.001, start=<double>self.now * 1e-9)
        self.wheel.origin = self.wheel.last = self.now
        self.timer_ns = NEVER
        self.thread = thread_here()
        self.ready = []
        self.ending = deque()
        self.pollers = []
        self.finished = loop.create_future()
        self.finished.set_result(None)

    def __dealloc__(self):
        free(self.buffer)

    cdef uint64_t refresh(self) noexcept:
        self.now = monotonic_ns()
        return self.now

    cdef int abandon(self) except -1:
        # In a forked child: nobody is the loop thread of what belongs to the parent.
        self.thread = 0
        return 0

    cdef int check_thread(self) except -1:
        if self.thread == 0:
            raise errors.DomiError(
                "this belongs to the process that was forked: make a node of the child's own")
        if outbound_here() is not None:
            raise errors.DomiError(
                "called from the thread of a Serial, which sends by the Serial's own verbs; "
                "drained() and the node are the event loop's")
        if thread_here() != self.thread:
            raise errors.DomiError(
                "called from another thread than the event loop's: use "
                "loop.call_soon_threadsafe(...); a Context may be answered from any thread")
        return 0

    cdef void begin_quantum(self, Session session) noexcept:
        # One that has had several in a row is likely to be alone. Its are longer, for a turn of the
        # loop costs system calls.
        if self.served is not <PyObject*>session:
            self.served = <PyObject*>session
            self.quanta = 0
        elif self.quanta < QUANTA_ALONE:
            self.quanta += 1
        self.quantum_end = self.now + (LONG_QUANTUM if self.quanta == QUANTA_ALONE else QUANTUM)
        self.slice_length = FIRST_SLICE
        self.slice_end = self.now + FIRST_SLICE

    cdef bint slice_is_over(self, uint64_t now) except -1:
        # Whether the session that is served has had its quantum. Each slice ends as a batch does.
        # The first are short, so that a peer that waits has something to do soon; the last are
        # long, for sending costs system calls.
        if now <= self.slice_end:
            return False
        if now > self.quantum_end:
            return True
        self.parsed = NULL      # what runs now is no handler of the last frame
        if self.ready:
            self.run_ready()
        self.flush_dirty()
        self.slice_length *= SLICE_GROWTH
        self.slice_end = min(self.quantum_end, monotonic_ns() + self.slice_length)
        return False

    cdef int enter(self) except -1:
        self.depth += 1
        return 0

    cdef int leave(self) except -1:
        # Ends a batch. Whatever the batch wrote goes out before the loop may block.
        try:
            if self.depth == 1:
                if self.ready:
                    self.run_ready()
                self.flush_dirty()
        finally:
            self.depth -= 1
            if self.ready:
                self.end_soon()     # the flush delivered the node's frames to itself
        return 0

    cdef int run_ready(self) except -1:
        # Each has its tick. What ends the loop leaves the others for the next batch.
        cdef list ready = self.ready
        cdef Ticker ticker
        self.ready = []
        try:
            while ready:
                ticker = ready.pop(0)
                ticker.tick()
        finally:
            self.ready += ready
            if ready:
                self.flush_dirty()
        return 0

    cdef int end_soon(self) except -1:
        if not self.burst:
            self.burst = True
            self.call_soon(self.end_burst)
        return 0

    cdef int mark_dirty(self, Session session) except -1:
        if not session.dirty:
            session.dirty = True
            self.queue_flush(session)
            if self.depth == 0 and not self.burst:
                self.end_soon()
                if session.role != ROLE_LOOPBACK:
                    session.flush()
            elif (self.polling and self.handles_the_last() and session.state == SESSION_UP
                    and session.role != ROLE_LOOPBACK):
                session.flush()
        return 0

    cdef bint handles_the_last(self) noexcept:
        # Whether nothing follows upon the frame whose handler runs. While the loop polls, what that
        # sends first does not wait for its end. A peer on the same processor would take that away
        # from the handler, and whoever sleeps takes longer to wake than the handler does.
        cdef PyObject* parsed = self.parsed
        return parsed is not NULL and (
            (<FrameReader>parsed).position == (<FrameReader>parsed).end)

    cdef void queue_flush(self, Session session) noexcept:
        if self.last_dirty is None:
            self.first_dirty = session
        else:
            self.last_dirty.next_dirty = session
        self.last_dirty = session

    cdef int flush_dirty(self) except -1:
        cdef Session session = self.first_dirty
        cdef Session following
        if session is None:
            return 0
        self.first_dirty = self.last_dirty = None
        self.flushed = 0
        try:
            while session is not None:
                following = session.next_dirty
                session.next_dirty = None
                session.dirty = False
                if session.queue.queued or session.driver is None:
                    session.flush()
                    self.flushed += 1
                session = following
        except BaseException:
            # A handler of the node's own frames raised what ends the loop: keep the rest.
            while following is not None:
                session = following
                following = session.next_dirty
                session.next_dirty = None
                self.queue_flush(session)
            raise
        finally:
            if self.first_dirty is not None:
                self.end_soon()     # written by what the flush ran: the node's frames to itself
        return 0

    def end_burst(self):
        self.burst = False
        self.streaming = self.published > 1
        self.published = 0
        self.refresh()
        self.enter()
        self.leave()

    cdef uint64_t schedule(self, TimerNode* node, uint64_t delay_ns) except 0:
        # Fires `delay_ns` after the clock's present time; returns that time.
        cdef uint64_t when = monotonic_ns() + delay_ns
        self.wheel.add(node, self.wheel.ticks_at(when))
        if when < self.timer_ns:
            self.arm()
        return when

    cdef int arm(self) except -1:
        # One timer of the loop for all timers of the wheel.
        cdef uint64_t when = self.wheel.next_ns()
        if when >= self.timer_ns or self.closed:
            return 0
        if self.timer is not None:
            self.timer.cancel()
        self.timer_ns = when
        self.timer = self.loop.call_later(
            max(0.0, (<double>when - <double>monotonic_ns()) * 1e-9), self.on_timer)
        return 0

    def on_timer(self):
        # A loop may round to milliseconds and call early: the clock decides.
        self.timer = None
        self.timer_ns = NEVER
        self.enter()
        try:
            self.wheel.advance_within(self.refresh(), NEVER)
        finally:
            try:
                self.leave()
            finally:
                self.arm()

    cdef int end_later(self, Session session) except -1:
        # Its handshake took too long. Those that have begun together end together: some at a time.
        self.ending.append(session)
        if self.ender is None:
            self.ender = self.call_soon(self.end_some)
        return 0

    def end_some(self):
        """End handshakes that took too long, for a while; the next have to wait for all else."""
        cdef Session session
        cdef uint64_t end = self.refresh() + ENDING_SLICE
        self.ender = None
        self.enter()
        try:
            while self.ending and monotonic_ns() < end:
                session = self.ending.popleft()
                if session.state != SESSION_CLOSED and session.state != SESSION_UP:
                    session.fail("no complete handshake in time", True)
        finally:
            try:
                self.leave()
            finally:
                if self.ending and self.ender is None:
                    self.ender = self.loop.call_later(ENDING_PAUSE * 1e-9, self.end_some)

    # -------------------------------------------------------------------------------- busy polling

    cdef bint start_polling(self, uint64_t busy_ns) except -1:
        # For a node or a serial that may want it, and then has to stop it; the longest wish counts.
        if busy_ns:
            if not self.pollers:
                add_spinner()
            self.pollers.append(busy_ns)
            self.busy_ns = max(self.pollers)
        return busy_ns > 0

    cdef int stop_polling(self, uint64_t busy_ns) except -1:
        self.pollers.remove(busy_ns)
        self.busy_ns = max(self.pollers, default=0)
        if not self.pollers:
            remove_spinner()
            self.look_at(None)
        return 0

    cdef int look_at(self, Session session) except -1:
        # By hand; None: at none.
        cdef Session before = self.latest
        if session is before:
            return 0
        if before is not None and before.driver is not None:
            before.driver.watch(before.on_readable)
        self.latest = session
        self.polls_alone = 0
        return 0

    cdef int poll_on(self, Session session) except -1:
        # There was traffic on this session.
        self.stirred = True
        self.vain = 0
        self.look_at(session)
        if not self.polling:
            self.polling = True
            self.call_soon(self.poll)
        return 0

    def poll(self):
        """Look for more, and have the loop come round again."""
        cdef Session session = self.latest
        cdef uint64_t now = monotonic_ns()
        cdef int looks
        self.polling = False
        if self.stirred:
            self.stirred = False
            self.traffic = now
        if self.closed or session is None or now - self.traffic > self.busy_ns:
            self.look_at(None)
            return
        self.polling = True
        self.polls += 1
        try:
            if self.polls_alone < POLLS_ALONE:
                self.polls_alone += 1
            else:
                session.driver.unwatch()
            for looks in range(0 if self.turn_due else LOOKS_A_TURN):
                session.read_batch()
                if (self.turn_due or session.state == SESSION_CLOSED
                        or (session.continuing and not session.holding)
                        or (self.stirred and self.now - now > LONG_QUANTUM)):
                    break
                self.vain += 1
                if self.vain % LOOKS_TO_YIELD == 0:
                    # Who is to send may be waiting for this processor.
                    with nogil:
                        sched_yield()
        finally:
            self.turn_due = False
            self.call_soon(self.poll)       # behind all that the messages have made ready

    def acquire(self):
        """A router begins to use it."""
        self.users += 1

    def release(self):
        """A router closes; the last one takes the engine's timer off the loop."""
        self.users -= 1
        if self.users == 0:
            self.closed = True
            self.look_at(None)
            engines.pop(self.loop, None)
            self.ending.clear()
            if self.ender is not None:
                self.ender.cancel()
                self.ender = None
            if self.timer is not None:
                self.timer.cancel()
                self.timer = None

    @property
    def timers(self):
        """Pending timers of the wheel."""
        return self.wheel.pending


cdef int spinners = 0               # threads of this process that poll


cdef int forget_spinners() noexcept:
    # In a forked child, which has none of these threads.
    global spinners
    spinners = 0
    return 0


cdef int remove_spinner() noexcept:
    global spinners
    spinners -= 1
    return 0


cdef int add_spinner() except -1:
    # As many as there are processors get in the way of everything else. The warning may raise.
    global spinners
    cdef int polling = spinners + 1
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") \
        else os.cpu_count() or 1
    if polling >= processors:
        warnings.warn(
            f"busy_poll: {polling} thread(s) of this process poll, and it may use {processors} "
            "processor(s): whatever else wants to run has to wait for them. Leave busy_poll at 0, "
            "or give each a processor of its own", RuntimeWarning, stacklevel=2)
    spinners = polling
    return 0


def engine_of(loop):
    """The engine of this loop, made when there is none. Called on the loop thread."""
    cdef Engine engine = engines.get(loop)
    if engine is None:
        engine = Engine(loop)
        engines[loop] = engine
    return engine
