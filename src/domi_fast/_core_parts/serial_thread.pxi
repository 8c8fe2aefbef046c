# Serial mode on a thread of its own: the loop thread puts frames into one ring, the serial thread
# puts what it sends into another, and each wakes the other by an eventfd when it sleeps.
#
# The sockets stay with the loop thread. Invariants: each ring has one thread that puts and one that
# takes; the serial thread touches no session's queue and not the router's table, but has the loop
# thread do it (on_loop), in the order of asking. A handler that waits gives the GIL up and holds
# nobody up; what both threads touch is said in _core.pxd.

cdef extern from *:
    """
    #include <poll.h>
    #include <pthread.h>
    #include <sys/eventfd.h>
    #include <time.h>

    static int domi_eventfd(void) { return eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC); }

    /* A counter that is full, which EAGAIN says, wakes too. */
    static void domi_eventfd_signal(int fd)
    {
        uint64_t one = 1;
        while (write(fd, &one, sizeof(one)) < 0 && errno == EINTR) {}
    }
    static void domi_eventfd_reset(int fd)
    {
        uint64_t count;
        while (read(fd, &count, sizeof(count)) < 0 && errno == EINTR) {}
    }
    /* Until the descriptor can be read, or for so many nanoseconds; UINT64_MAX: for ever. */
    static void domi_wait_readable(int fd, uint64_t most)
    {
        struct pollfd polled = {fd, POLLIN, 0};
        struct timespec time;
        time.tv_sec = (time_t)(most / 1000000000u);
        time.tv_nsec = (long)(most % 1000000000u);
        ppoll(&polled, 1, most == UINT64_MAX ? NULL : &time, NULL);
    }

    /* For the serial thread that found no room for a record of `size` bytes that refers to an
       object of `owned`: wait until there is, and a sixteenth of the ring at least, for as long as
       the consumer takes something out in each 0.1 s. */
    static void domi_wait_for_room(domi_ring *ring, uint32_t size, uint64_t owned, uint64_t most)
    {
        const struct timespec pause = {0, 100000};
        const uint64_t takes = domi_ring_takes(ring, size);
        const uint64_t wanted = takes > ring->capacity / 16 ? takes : ring->capacity / 16;
        uint64_t before = domi_ring_gets(ring), after;
        int looks = 0;
        while (domi_ring_used(ring) + wanted > ring->capacity
               || (owned && !domi_ring_may_own(ring, owned, most))) {
            after = domi_ring_gets(ring);
            if (after != before)
                looks = 0;
            else if (++looks == 1000)
                return;
            before = after;
            nanosleep(&pause, NULL);
        }
    }

    /* The clock of what this thread computes; -1 where there is none. */
    static int domi_cpu_clock_here(void)
    {
        clockid_t clock;
        return pthread_getcpuclockid(pthread_self(), &clock) == 0 ? (int)clock : -1;
    }
    /* Nanoseconds that the thread of this clock has computed; 0 once it has ended. */
    static uint64_t domi_cpu_ns(int clock)
    {
        struct timespec time;
        if (clock_gettime((clockid_t)clock, &time) < 0)
            return 0;
        return (uint64_t)time.tv_sec * 1000000000u + (uint64_t)time.tv_nsec;
    }

    /* The Outbound of this thread, borrowed; NULL on every thread that is no serial thread. */
    static _Thread_local PyObject *domi_outbound_here;
    #define DOMI_OUTBOUND_HERE() (domi_outbound_here)
    #define DOMI_SET_OUTBOUND_HERE(outbound) (domi_outbound_here = (outbound))
    """
    int eventfd_new "domi_eventfd"() noexcept
    void eventfd_signal "domi_eventfd_signal"(int fd) noexcept nogil
    void eventfd_reset "domi_eventfd_reset"(int fd) noexcept nogil
    void wait_readable "domi_wait_readable"(int fd, uint64_t most) noexcept nogil
    void wait_for_room "domi_wait_for_room"(Ring* ring, uint32_t size, uint64_t owned,
                                            uint64_t most) noexcept nogil
    int cpu_clock_here "domi_cpu_clock_here"() noexcept
    uint64_t cpu_ns "domi_cpu_ns"(int clock) noexcept
    PyObject* get_outbound_here "DOMI_OUTBOUND_HERE"() noexcept
    void set_outbound_here "DOMI_SET_OUTBOUND_HERE"(PyObject* outbound) noexcept


cdef inline Outbound outbound_here():
    # Where this thread's messages go, if it is a serial thread; otherwise None.
    cdef PyObject* found = get_outbound_here()
    return None if found is NULL else <Outbound><object>found


@cython.final
cdef class Outbound(Verbs):
    """The verbs as a serial thread has them: what it sends waits in a ring for the loop thread.

    What can be known at once is raised at once: that nobody subscribes, that there is no session
    with ``to``, that the data is too large, or that the ring is full (RingFull). What the node
    refuses later goes to ``on_error``. On the loop thread these are the node's own verbs.
    """

    def __cinit__(self, ThreadScheduler scheduler not None, ring_size):
        self.wake_fd = -1
        self.scheduler = scheduler
        self.router = scheduler.router
        self.ring = ring_new(ring_capacity(ring_size))
        if self.ring is NULL:
            raise MemoryError
        live(LIVE_RING, 1)
        self.most = min(<uint64_t>RING_BY_REFERENCE, ring_most(self.ring)) - sizeof(Departure)
        self.late = deque()

    def __dealloc__(self):
        if self.ring is not NULL:
            while self.drop_record():
                pass
            ring_free(self.ring)
            live(LIVE_RING, -1)
        if self.wake_fd >= 0:
            c_close(self.wake_fd)

    # ----------------------------------------------------------------------- on the serial thread

    cdef inline bint is_here(self) except -1:
        # Whether this is the serial thread. On any other the node's own verb says what is allowed.
        return get_outbound_here() is <PyObject*>self and self.check_node()

    cdef bint check_node(self) except -1:
        # Raises what forbids to send now.
        if self.engine.thread == 0:
            self.engine.check_thread()
        if self.router.engine is None:
            raise errors.DomiError("not connected: the node of this serial is closed")
        return True

    cdef int check_route(self, int channel, object to, bint keyless) except -1:
        if to is not None or self.router.channels[channel].route is NULL:
            self.router.pick_named(channel, to)
        elif self.router.balanced and not keyless:
            check_keyless(policy_at(self.router, channel))
        return 0

    cdef int put(self, uint8_t verb, int channel, int reply, object to, object data,
                 Context context) except -1:
        cdef Departure departure
        cdef Py_buffer view
        cdef size_t size, owned = 0
        cdef uint8_t* payload
        cdef PyObject* whole = NULL
        departure.to = -1 if to is None else machine_of(to)
        get_view(data, &view)
        try:
            size = <size_t>view.len
            self.check_size(channel, size + (
                0 if verb == VERB_NOTIFY else ANSWER_EXTEND if verb == VERB_REPLY else 4))
            if size > self.most:
                data = data if PyBytes_CheckExact(data) else bytes_of(data)
                whole = <PyObject*>data
                owned = size
                size = 0
            payload = self.claim(<uint32_t>(sizeof(Departure) + size), owned)
            if payload is NULL:
                raise self.full(channel)
            departure.context = <PyObject*>context if context is not None else NULL
            departure.whole = whole
            departure.size = <uint32_t>size
            departure.channel = <uint16_t>channel
            departure.reply = <uint16_t>reply
            departure.verb = verb
            departure.quiet = self.telling
            Py_XINCREF(departure.context)
            Py_XINCREF(departure.whole)
            copy(payload, &departure, sizeof(Departure))
            copy(payload + sizeof(Departure), view.buf, size)
            if owned:
                ring_own(self.ring, owned)
            ring_publish_alone(
                self.ring, payload, <uint32_t>(sizeof(Departure) + size), RING_FRAME)
        finally:
            PyBuffer_Release(&view)
        return self.wake()

    cdef int wake(self) except -1:
        if ring_must_wake(self.ring):
            eventfd_signal(self.wake_fd)
        return 0

    cdef uint8_t* claim(self, uint32_t size, size_t owned) except? NULL:
        # This thread may wait, while the loop thread takes out what is there already.
        cdef uint8_t* payload = self.try_to_claim(size, owned)
        cdef size_t most = self.router.queue_limit
        if payload is NULL:
            with nogil:
                wait_for_room(self.ring, size, owned, most)
            payload = self.try_to_claim(size, owned)
        return payload

    cdef uint8_t* try_to_claim(self, uint32_t size, size_t owned) except? NULL:
        if self.late or (
                owned and not ring_may_own(self.ring, owned, self.router.queue_limit)):
            return NULL
        return ring_claim_alone(self.ring, size)

    cdef object full(self, int channel):
        self.router.count("outbound_full")
        return errors.RingFull(
            f"{ring_count(self.ring)} messages of the serial thread wait for the node's loop, as "
            "many as its ring has room for: send less, or make it larger",
            channel=channel, limit=ring_count(self.ring))

    cdef int check_size(self, int channel, size_t size) except -1:
        if HEADER + size > self.router.frame_limit:
            raise frame_too_large(self.router, <uint16_t>channel, HEADER + size)
        return 0

    cdef bint put_call(self, object function, tuple arguments) except -1:
        # A call, after what was sent before: whether there was room.
        cdef PyObject* call
        cdef uint8_t* payload
        pair = (function, arguments)    # before the claim: to make it may run Python code
        payload = self.claim(sizeof(PyObject*), 0)
        if payload is NULL:
            return False
        call = <PyObject*>pair
        Py_INCREF(pair)
        copy(payload, &call, sizeof(PyObject*))
        ring_publish_alone(self.ring, payload, sizeof(PyObject*), RING_REFERENCE)
        self.wake()
        return True

    cdef int on_loop(self, object function, tuple arguments) except -1:
        # A call that must not be lost.
        if not self.put_call(function, arguments):
            self.late.append((function, arguments))
            self.wake()
        return 0

    cdef int ask_loop(self, int channel, object function, tuple arguments) except -1:
        # A call that a program makes, which can be told that there is no room.
        if not self.put_call(function, arguments):
            raise self.full(channel)
        return 0

    cdef object chosen(self, int channel, object to, object key, object policy):
        if not self.is_here():
            return self.router.chosen(channel, to, key, policy)
        return self.router.choose_peer(channel, to, key, policy)

    cdef int send_notify(self, int channel, object data, object to, bint keyless) except -1:
        if not self.is_here():
            return self.router.send_notify(channel, data, to, keyless)
        self.check_route(channel, to, keyless)
        return self.put(VERB_NOTIFY, channel, 0, to, data, None)

    cdef int send_publish(self, int channel, object data, object to) except -1:
        cdef Route* route
        cdef int copies
        if not self.is_here():
            return self.router.send_publish(channel, data, to)
        route = self.router.channels[channel].route
        if to is not None:
            self.check_route(channel, to, True)
        copies = 1 if to is not None else 0 if route is NULL else route.count
        self.put(VERB_PUBLISH, channel, 0, to, data, None)
        return copies

    cdef int send_call(self, int channel, object data, int reply, object to,
                       bint keyless) except -1:
        if not self.is_here():
            return self.router.send_call(channel, data, reply, to, keyless)
        self.check_route(channel, to, keyless)
        return self.put(VERB_CALL, channel, reply, to, data, None)

    cdef object send_request(self, int channel, object data, object timeout, object to):
        cdef double until = INFINITY
        if not self.is_here():
            return self.router.send_request(channel, data, timeout, to)
        self.check_route(channel, to, False)
        data = bytes_of(data)
        self.check_size(channel, len(data) + REQUEST_EXTEND)
        if timeout is ...:
            timeout = self.router.timeout
        if timeout is not None:
            until = (<double>monotonic_ns() * 1e-9
                     + seconds_of(timeout, channel, -1 if to is None else to))
        request = SerialRequest(self)
        self.ask_loop(channel, self.begin_request, (request, channel, data, until, to))
        return request

    cdef int send_stages(self, list channels, object data) except -1:
        if not self.is_here():
            return self.router.send_stages(channels, data)
        cdef int first = channels[0]
        self.check_route(first, None, True)
        data = bytes_of(data)
        self.check_size(first, len(data) + 2 * len(channels) - 1)
        return self.ask_loop(first, self.begin_stages, (channels, data))

    # ------------------------------------------------------------------------- on the loop thread

    cdef int open(self, Engine engine) except -1:
        self.engine = engine
        self.wake_fd = eventfd_new()
        if self.wake_fd < 0:
            raise OSError(errno, os.strerror(errno))
        ring_will_sleep(self.ring, RING_SLEEPS)
        engine.loop.add_reader(self.wake_fd, self.on_wake)
        return 0

    cdef int close(self) except -1:
        # After the serial thread has ended: what it has sent goes out.
        cdef int fd = self.wake_fd
        if fd < 0:
            return 0
        while not self.is_empty():
            self.drain()
        self.wake_fd = -1
        if not self.engine.loop.is_closed():
            self.engine.loop.remove_reader(fd)
        c_close(fd)
        return 0

    def on_wake(self):
        """The serial thread has put something into the ring."""
        if self.wake_fd < 0:
            return
        eventfd_reset(self.wake_fd)
        try:
            self.drain()
        finally:
            self.rest()

    cdef int rest(self) except -1:
        # Until the serial thread puts something into the empty ring; or go on soon.
        if self.is_empty():
            ring_will_sleep(self.ring, RING_SLEEPS)
            if self.is_empty():
                return 0
            ring_is_awake(self.ring)
        self.engine.call_soon(self.on_wake)
        return 0

    cdef bint is_empty(self) except -1:
        return ring_is_empty(self.ring) and not self.late

    cdef int drain(self) except -1:
        # One turn of sending, in a batch.
        cdef uint64_t until = self.engine.refresh() + QUANTUM
        cdef uint32_t size
        cdef int kind
        cdef int left = CLOCK_EVERY
        cdef uint8_t* payload
        self.engine.enter()
        try:
            while True:
                payload = ring_peek(self.ring, &size, &kind)
                if payload is not NULL:
                    self.depart(payload, size, kind)
                elif self.late:
                    function, arguments = self.late.popleft()
                    self.make_call(function, arguments)
                else:
                    break
                left -= 1
                if left == 0:
                    if monotonic_ns() > until:
                        break
                    left = CLOCK_EVERY
        finally:
            self.engine.leave()
        return 0

    cdef int depart(self, uint8_t* payload, uint32_t size, int kind) except -1:
        cdef Departure departure
        cdef PyObject* call
        cdef Context context = None
        cdef bytes data
        if kind == RING_REFERENCE:
            copy(&call, payload, sizeof(PyObject*))
            ring_consume(self.ring, payload, size)
            pair = <tuple>call
            Py_DECREF(pair)             # the record's
            self.make_call(pair[0], pair[1])
            return 0
        copy(&departure, payload, sizeof(Departure))
        if departure.whole is not NULL:
            data = <bytes>departure.whole
            Py_DECREF(data)             # the record's
            ring_disown(self.ring, len(data))
        else:
            data = PyBytes_FromStringAndSize(
                <char*>payload + sizeof(Departure), departure.size)
        if departure.context is not NULL:
            context = <Context>departure.context
            Py_DECREF(context)          # the record's
        ring_consume(self.ring, payload, size)
        if context is not None:
            context._posted_answer("reply", data)
            return 0
        to = None if departure.to < 0 else departure.to
        try:
            if departure.verb == VERB_NOTIFY:
                self.router.send_notify(departure.channel, data, to, True)
            elif departure.verb == VERB_PUBLISH:
                self.router.telling = departure.quiet
                try:
                    self.router.send_publish(departure.channel, data, to)
                finally:
                    self.router.telling = False
            else:
                self.router.send_call(departure.channel, data, departure.reply, to, True)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:
            self.router.report(error, Frame(departure.channel, data))
        return 0

    def make_call(self, function, arguments):
        """What the serial thread has asked for."""
        try:
            function(*arguments)
        except (KeyboardInterrupt, SystemExit):
            raise
        except errors.DomiError as error:
            self.router.report(error, Frame(error.channel or 0, b""))
        except BaseException as error:
            log.error("what a serial thread asked of the node failed: %s", error, exc_info=error)

    def begin_request(self, request, int channel, data, double until, to):
        """Send a request that the serial thread has made, unless it was cancelled meanwhile."""
        if request.cancelled():
            return
        timeout = None if until == INFINITY else until - <double>monotonic_ns() * 1e-9
        try:
            request._follow(self.router.send_request(channel, data, timeout, to))
        except BaseException as error:
            request._end(error, None)
            if isinstance(error, (KeyboardInterrupt, SystemExit)):
                raise

    def begin_stages(self, channels, data):
        """Start a pipeline for the serial thread."""
        try:
            self.router.send_stages(channels, data)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:
            self.router.report(error, Frame(channels[0], data))

    cdef bint drop_record(self) noexcept:
        # Whether there was one; the references that it owns go.
        cdef Departure departure
        cdef PyObject* call
        cdef uint32_t size
        cdef int kind
        cdef uint8_t* payload = ring_peek(self.ring, &size, &kind)
        if payload is NULL:
            return False
        if kind == RING_REFERENCE:
            copy(&call, payload, sizeof(PyObject*))
            ring_consume(self.ring, payload, size)
            Py_DECREF(<object>call)
            return True
        copy(&departure, payload, sizeof(Departure))
        ring_consume(self.ring, payload, size)
        Py_XDECREF(departure.context)
        Py_XDECREF(departure.whole)
        return True


class SerialRequest(concurrent.futures.Future):
    """The answer to a ``request`` of a serial thread: a :class:`concurrent.futures.Future`.

    ``result()`` waits on the serial thread, where meanwhile nothing else runs, and raises what the
    request ended with. Callbacks of ``add_done_callback`` run on the serial thread, in their turn.
    """

    def __init__(self, outbound):
        super().__init__()
        self._outbound = outbound
        self._request = None

    def add_done_callback(self, fn):
        """Have ``fn(self)`` called on the serial thread once this has ended."""
        scheduler = (<Outbound?>self._outbound).scheduler
        super().add_done_callback(lambda done: scheduler.post(fn, (done,)))

    def cancel(self):
        """Stop waiting; the work at the other node is not stopped. False when it has ended."""
        if self.cancelled():
            return True
        if not super().cancel():
            return False
        self.set_running_or_notify_cancel()     # tells those who wait for several
        (<Outbound?>self._outbound).engine.call_soon_threadsafe(self._stop)
        return True

    def _stop(self):
        if self._request is not None:
            self._request.cancel()

    def _follow(self, request):
        self._request = request
        request.add_done_callback(self._settle)

    def _settle(self, request):
        if not request.cancelled():
            error = request.exception()
            self._end(error, request.result() if error is None else None)

    def _end(self, error, answer):
        # Another thread may cancel at any moment.
        try:
            if error is not None:
                self.set_exception(error)
            else:
                self.set_result(answer)
        except concurrent.futures.InvalidStateError:
            pass


@cython.final
cdef class ThreadScheduler(Scheduler):
    """The serial thread is a thread of its own, which sleeps when there is nothing to run.

    After the last message it looks for more for ``busy_poll`` seconds before it sleeps.
    """

    def __cinit__(self, router, ring_size, *ignored):
        self.wake_fd = -1
        self.posts = deque()
        self.spill = deque()
        self.held = []
        self.cpu_clock = -1
        self.outbound = Outbound(self, ring_size)

    def __dealloc__(self):
        if self.wake_fd >= 0:
            c_close(self.wake_fd)

    @property
    def verbs(self):
        """The sending verbs, for the serial thread."""
        return self.outbound

    # ------------------------------------------------------------------------------ from any thread

    cdef inline bint is_here(self) noexcept:
        return get_outbound_here() is <PyObject*>self.outbound

    @property
    def backlog(self):
        """Messages that wait in the ring, and for room in it."""
        return ring_count(self.ring) + len(self.spill)

    cdef int check_caller(self) except -1:
        if self.engine is None:
            return 0
        if self.engine.thread == 0 or not (
                self.is_here() or thread_here() == self.engine.thread):
            self.engine.check_thread()
        return 0

    cdef int on_loop(self, object function, tuple arguments) except -1:
        if self.is_here():
            return self.outbound.on_loop(function, arguments)
        function(*arguments)
        return 0

    def post(self, function, arguments):
        """Have the serial thread call it, in its turn; once that has ended, call it here."""
        self.posts.append((function, arguments))
        if self.has_ended:
            self.run_posts()
        else:
            self.wake()

    cdef int wake(self) except -1:
        if self.wake_fd >= 0 and ring_must_wake(self.ring):
            eventfd_signal(self.wake_fd)
        return 0

    cdef int arm(self) except -1:
        # The serial thread looks at the wheel before it sleeps.
        return 0 if self.is_here() else self.wake()

    cdef int tick(self) except -1:
        # The end of a batch that has put something into the ring.
        self.ready = False
        return self.wake()

    cdef int overflow(self, SerialChannel intake, Session session, RawFrame* frame) except -1:
        # The sender waits while the serial thread keeps going: its message waits beside the ring,
        # and its session reads no more until there is room. A thread that waits itself may do so
        # for long: then the message is refused, and those of other channels are read on.
        cdef Context context
        if ring_gets(self.ring) < self.slow_until:
            if self.spilled and not self.spill:
                # All that waited beside the ring was taken, which the loop is about to hear.
                self.make_way()
                if intake.has_put(session, frame):
                    return self.awaken()
            return self.refuse(session, frame)
        context = Context.__new__(Context)
        fill_context(context, session, frame, session.engine.now)
        self.spill.append((intake, context))
        self.spilled = True
        self.hold(session)
        return self.awaken()

    cdef int hold(self, Session session) except -1:
        session.hold_reading()
        self.held.append(session)
        if self.patience is None:
            self.see_pace()
            self.patience = self.router.call_later(LOOK_EVERY, self.lose_patience)
        return 0

    cdef int see_pace(self) except -1:
        self.seen_gets = ring_gets(self.ring)
        self.seen_cpu = cpu_ns(self.cpu_clock)
        self.looks = 0
        return 0

    def lose_patience(self):
        """Look whether the serial thread keeps going; if it does not, read on without it.

        What counts is how often the loop looked, and not for how long: while the machine stood
        still, or the loop kept the interpreter's lock, the thread had no time either. Nor has it
        where the kernel gives it no processor.
        """
        cdef uint64_t gets = ring_gets(self.ring)
        self.patience = None
        if not self.held or self.router.engine is None:
            return
        self.looks += 1
        if gets >= self.seen_gets + BUSY_PACE or cpu_ns(self.cpu_clock) >= self.seen_cpu + BUSY_CPU:
            self.see_pace()
        elif self.looks == LOOKS and wants_to_run(self.thread.native_id):
            self.see_pace()
        elif self.looks == LOOKS:
            self.slow_until = gets + SLOW_RECORDS
            self.release()
            return
        self.patience = self.router.call_later(LOOK_EVERY, self.lose_patience)

    def make_way(self):
        """The serial thread has made room: what comes goes into the ring again."""
        self.asked = False
        if not self.spill:
            self.spilled = False
            self.release()

    cdef int release(self) except -1:
        cdef list held = self.held
        cdef Session session
        self.held = []
        if self.patience is not None:
            self.patience.cancel()
            self.patience = None
        for session in held:
            session.go_on_reading()
        return 0

    # --------------------------------------------------------------------------- on the loop thread

    cdef int open(self) except -1:
        self.wake_fd = eventfd_new()
        if self.wake_fd < 0:
            raise OSError(errno, os.strerror(errno))
        self.outbound.open(self.engine)
        if self.spin_ns:
            add_spinner()
            self.spins = True
        thread = threading.Thread(target=self.run, name=self.name, daemon=True)
        thread.start()
        self.thread = thread
        self.router.reporters.append(self)
        return 0

    def stop_taking(self):
        self.take_no_more()
        self.release()
        if self.thread is None or self.has_ended:
            return None
        self.emptied = self.engine.loop.create_future()
        self.wake()
        return self.emptied

    cdef int close(self) except -1:
        cdef int fd = self.wake_fd
        self.stop_reporting()
        if self.spins:
            self.spins = False
            remove_spinner()
        if self.thread is None:
            self.end()
        elif self.has_ended:
            self.thread.join()
        else:
            self.was_left = True
            return 0            # nobody waits any more: what it uses is its own until it ends
        self.outbound.close()
        self.wake_fd = -1
        if fd >= 0:
            c_close(fd)
        return 0

    def end_waiting(self):
        """The thread has called its last handler."""
        self.has_ended = True
        self.run_posts()
        if self.was_left:
            self.close()
        if self.emptied is not None and not self.emptied.done():
            self.emptied.set_result(None)

    # ------------------------------------------------------------------------ the thread's own life

    def run(self):
        """The whole life of the thread."""
        set_outbound_here(<PyObject*>self.outbound)
        self.cpu_clock = cpu_clock_here()
        try:
            while self.state == SERIAL_RUNNING or self.has_work() or self.posts:
                try:
                    if self.has_work() or self.posts:
                        self.traffic = monotonic_ns()
                    self.run_posts()
                    self.run_tick(monotonic_ns() + self.drain_ns)
                except BaseException as error:
                    self.raised(error)
                if self.spilled and not self.asked and self.has_room():
                    self.ask_for_way()
                # While there is work the interpreter's lock is given up to who asks for it, and not
                # between ticks: who waits for it would find it taken again before it wakes up, and
                # ask anew each time.
                if not self.has_work() and not self.posts:
                    self.wait()
            self.stop_reporting()
            while self.posts:
                try:
                    self.run_posts()
                except BaseException as error:
                    self.raised(error)
            self.end()
        finally:
            set_outbound_here(NULL)
            try:
                self.engine.call_soon_threadsafe(self.end_waiting)
            except RuntimeError:
                pass            # the loop is closed

    cdef bint has_room(self) noexcept:
        # Enough for the sessions that are held to go on for a while.
        cdef uint64_t limit = self.router.queue_limit
        return (not self.spill and ring_used(self.ring) <= self.ring_bytes - self.ring_bytes // 16
                and ring_may_own(self.ring, limit // 16, limit))

    cdef int drain_spill(self, uint64_t until) except -1:
        while self.spill and self.state != SERIAL_CLOSED:
            intake, context = self.spill.popleft()
            (<SerialChannel>intake).run(context)
            if monotonic_ns() > until:
                break
        return 0

    cdef bint has_work(self) noexcept:
        return Scheduler.has_work(self) or (self.spilled and len(self.spill) > 0)

    cdef int ask_for_way(self) except -1:
        self.asked = True
        try:
            self.engine.call_soon_threadsafe(self.make_way)
        except RuntimeError:
            pass                # the loop is closed
        return 0

    cdef int stop_reporting(self) except -1:
        # From now on `on_error` is called on the loop thread: this one will not get to it.
        if self in self.router.reporters:
            self.router.reporters.remove(self)
        return 0

    cdef int raised(self, object error) except -1:
        # Handlers' and timers' own errors are caught where they are called.
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            return self.on_loop(end_loop, (error,))
        log.critical("a tick of a serial thread failed", exc_info=error)
        return 0

    cdef int run_posts(self) except -1:
        # Those that are there now: what they post waits for the next tick.
        cdef Py_ssize_t count = len(self.posts)
        while count:
            count -= 1
            function, arguments = self.posts.popleft()
            try:
                function(*arguments)
            except (KeyboardInterrupt, SystemExit):
                raise
            except BaseException as error:
                log.error("a callback of a serial thread failed", exc_info=error)
        return 0

    cdef int wait(self) except -1:
        # Until there is something to run, or a timer is due.
        cdef uint64_t now = monotonic_ns(), due = self.wheel.next_ns(), most = NEVER
        cdef int fd = self.wake_fd
        if now < self.traffic + self.spin_ns and self.spin(due):
            return 0
        ring_will_sleep(self.ring, RING_SLEEPS)
        due = self.wheel.next_ns()
        if self.has_work() or self.posts or self.state != SERIAL_RUNNING:
            ring_is_awake(self.ring)
            return 0
        if due != NEVER:
            now = monotonic_ns()
            most = due - now if due > now else 0
        with nogil:
            wait_readable(fd, most)
            eventfd_reset(fd)
        ring_is_awake(self.ring)
        return 0

    cdef bint spin(self, uint64_t due) except -1:
        # Whether there is something to run, or a timer is due, before the time is up.
        cdef uint64_t until = self.traffic + self.spin_ns, now = 0
        cdef uint64_t looks = 0
        ring_will_sleep(self.ring, RING_SPINS)
        if self.has_work() or self.posts or self.state != SERIAL_RUNNING:
            return True
        with nogil:
            while not ring_was_woken(self.ring):
                now = monotonic_ns()
                if now > until or now > due:
                    break
                looks += 1
                if looks % SPINS_TO_YIELD == 0:
                    sched_yield()
        self.polls += looks
        return ring_was_woken(self.ring) or now > due


cdef bint wants_to_run(object thread) except -1:
    # Whether the kernel runs this thread, or would if a processor were free: proc(5), the state in
    # /proc/pid/stat. Where that cannot be told it does not.
    try:
        with open(f"/proc/self/task/{thread}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[0] == b"R"
    except OSError:
        return False


def end_loop(error):
    """Raise on the loop what a handler on a serial thread has raised to end the program."""
    raise error
