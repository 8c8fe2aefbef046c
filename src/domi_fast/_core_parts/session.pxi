# One connection: handshake, reading by quanta, flushing.
#
# Invariants: every wake-up ends in EAGAIN, the end of the stream, an error, or a call_soon
# continuation (libuv stops polling after an error, so a reader that stops early would never hear
# of the peer's death); `state` is checked after each handler; fail() is the one way down. Owned by
# the loop thread.

cdef int get_view(object data, Py_buffer* view) except -1:
    if isinstance(data, str):
        raise TypeError("data must be bytes-like, not str: encode it first")
    return PyObject_GetBuffer(data, view, PyBUF_SIMPLE)


cdef bytes bytes_of(object data):
    # A copy of any bytes-like object, under the rules by which verbs take one.
    cdef Py_buffer view
    get_view(data, &view)
    try:
        return PyBytes_FromStringAndSize(<char*>view.buf, view.len)
    finally:
        PyBuffer_Release(&view)


cdef object frame_too_large(Router router, uint16_t channel, size_t length):
    # Of what is sent; counted.
    cdef uint32_t limit = router.frame_limit
    router.count("refused_frame_limit")
    return errors.FrameError(
        f"a frame of {length} bytes on channel {channel}: at most {limit} (frame_limit) are "
        "allowed", channel=channel, limit=limit)


cdef object overloaded(Session session, uint16_t channel, object limit, str text):
    # No room to this peer now.
    cdef str advice = advice_of(session)
    return overloaded_as(session, channel, limit, (text + advice,), advice)


cdef str advice_of(Session session):
    return (": await drained() or send less" if session.role == ROLE_UPLINK
            else f": await node.drained({session.peer}) or send less")


cdef object overloaded_as(Session session, uint16_t channel, object limit, tuple args,
                          str advice):
    # What Overloaded() makes, without a call: it may be made for each message.
    cdef object error = new_error(errors.Overloaded, args)
    error.__dict__ = {"channel": channel, "peer": session.peer, "limit": limit, "advice": advice}
    return error


cdef inline int write_frame(Session session, uint16_t channel, const uint8_t* data, size_t size,
                            const uint8_t* extend, uint16_t extend_size,
                            PyObject* owner) except -1:
    cdef size_t length = HEADER + size + extend_size
    if (session.state == SESSION_CLOSED or length > session.router.frame_limit
            or session.queue.queued >= session.gate) and not session.find_room(
                channel, length, extend, extend_size):
        return 0
    if session.limited and channel <= USER_LAST and not let_pass(session, length):
        return session.refuse_rate(channel)
    append_frame(
        <WriteQueue><PyObject*>session.queue, channel, data, size, extend, extend_size, owner)
    session.frames_out += 1
    if not session.dirty:
        session.engine.mark_dirty(session)
    elif session.queue.queued >= FLUSH_AT and session.driver is not None:
        session.flush()
    return 0


cdef inline int write_data(Session session, uint16_t channel, object data, const uint8_t* extend,
                           uint16_t extend_size) except -1:
    # write_frame() for any bytes-like object.
    if not PyBytes_CheckExact(data):
        return session.put_view(channel, data, extend, extend_size)
    return write_frame(session, channel, <uint8_t*>PyBytes_AS_STRING(data),
                       <size_t>PyBytes_GET_SIZE(data), extend, extend_size, <PyObject*>data)


@cython.final
cdef class Session:
    """A live connection to one peer. The mesh makes them; a program sees them as peers.

    :param router: the node that it belongs to.
    :param fd: a connected, non-blocking, detached descriptor; -1 for the node's own loop-back.
    :param role: one of the ``ROLE_*`` numbers.
    :param address: where it leads, for people.
    :param guard: this side of the authentication (``authentication.Guard``), which comes before
        anything else; None: there is none.
    :param tls: the ``ssl.SSLContext`` by which the connection is enciphered; None: it is not.
    """

    def __cinit__(self, Router router not None, int fd, int role, str address not None, *,
                  int peer=-1, info=None, guard=None, tls=None):
        if router.engine is None:
            raise errors.DomiError("the router is not started")
        if not -1 <= peer < MAX_MACHINES:
            raise ValueError(f"machine id {peer}: ids are 0-1023")
        live(LIVE_SESSION, 1)
        self.counted = True
        self.router = router
        self.engine = router.engine
        self.role = role
        self.address = address
        self.peer = peer
        self.info = info
        self.guard = guard
        self.channels = set()
        self.room_waiters = []
        self.queue = WriteQueue()
        self.room = self.gate = room_at_least(router)
        self.when_full = router.full_default
        self.heartbeat.node.kind = TIMER_SESSION
        self.heartbeat.owner = <PyObject*>self
        self.last_heard = monotonic_ns()
        if role == ROLE_LOOPBACK:
            self.state = SESSION_UP
            self.extended = True
            return
        self.reader = FrameReader(
            AUTH_LIMIT if guard is not None
            else HANDSHAKE_LIMIT if role == ROLE_ACCEPTOR else router.frame_limit,
            magic=role == ROLE_ACCEPTOR)
        self.driver = new_driver(self.engine, fd, tls, role == ROLE_ACCEPTOR)
        self.state = SESSION_MAGIC if role == ROLE_ACCEPTOR else SESSION_DIALLED
        self.on_readable = self.readable
        self.on_writable = self.writable

    def __dealloc__(self):
        # A loop that was closed with sessions open never failed them.
        if self.heartbeat.node.next is not NULL:
            unlink_node(&self.heartbeat.node)
        if self.counted:
            live(LIVE_SESSION, -1)

    # ------------------------------------------------------------------------- life, for the mesh

    def start(self):
        """Begin to read; the handshake has to be complete within the handshake timeout."""
        self.engine.check_thread()
        self.driver.want_read(self.on_readable)
        self.engine.schedule(&self.heartbeat.node, self.router.handshake_ns)

    def dial(self, uint16_t channel, bytes name, bytes offer):
        """Say the magic and who dials: ``name`` as data, ``offer`` as extend.

        Where there is a guard, it has its say first.
        """
        cdef uint8_t magic[4]
        cdef int failure
        store32(magic, MAGIC)
        failure = self.driver.begin(PyBytes_FromStringAndSize(<char*>magic, 4))
        if failure:
            self.stop_for(-failure)
            return          # and the mesh has been told
        self.naming = (channel, name, offer)
        if self.guard is None:
            self.say_name()
        else:
            self.control(CH_AUTH, self.guard.hello())

    cdef int say_name(self) except -1:
        cdef bytes offer
        cdef tuple naming = self.naming
        if naming is None:
            return 0
        self.naming = None
        channel, name, offer = naming
        return self.put(channel, name, <uint8_t*>PyBytes_AS_STRING(offer), <uint16_t>len(offer))

    def close(self, str reason not None, bint closing=False):
        """Say goodbye and close. What the kernel does not take at once is not sent.

        To send everything first, await :meth:`drained` with ``everything=True``. The node that is
        ``closing`` waits until its router says that nothing is unacknowledged: a socket that is
        closed while something stands in it unread throws away what it has not sent yet.
        """
        cdef Session main = main_of(self)
        cdef Session connection
        if self.state == SESSION_CLOSED:
            return
        for connection in connections_of(main):
            if (connection.state != SESSION_MAGIC and connection.driver is not None
                    and not connection.is_guarded()):
                connection.goodbye(reason)
                if (closing and connection.state != SESSION_CLOSED
                        and connection.queue.queued == 0
                        and bytes_on_their_way(connection.driver.fd)):
                    linger(connection, True)
        main.fail(reason)

    def expect_lanes(self, int count):
        """The session is to have so many connections, 2 or more, before it is up.

        They have as much time again as it had.
        """
        self.lanes = [self] + [None] * (count - 1)
        self.engine.wheel.remove(&self.heartbeat.node)
        self.engine.schedule(&self.heartbeat.node, self.router.handshake_ns)

    def welcome(self, bytes data):
        """Let the dialler in that ``mesh.admit`` has put off deciding about."""
        if self.state == SESSION_EXAMINED:
            self.state = SESSION_NAMED
            self.control(CH_WELCOME, data)

    def refuse(self, error):
        """Close because of what the peer said, with the reason logged and counted.

        TryAgain, which is nobody's fault, is neither a warning nor bad input.
        """
        if self.state == SESSION_CLOSED:
            return
        text = printable(str(error))        # which may quote the peer
        if isinstance(error, errors.AuthError):
            self.router.count("refused_auth")
        elif isinstance(error, errors.TryAgain):
            self.router.count("handshakes_put_off")
            log.debug("the handshake with %s is put off: %s", self.address, text,
                      extra={"domi_address": self.address})
            if self.state == SESSION_CLOSED:        # by who heard of it
                return
        if self.extended:
            # Who does not belong is not told why, where something keeps strangers out.
            self.goodbye("" if isinstance(error, errors.AuthError) and self.is_private()
                         else text)
        self.fail(text, not isinstance(error, errors.TryAgain))

    cdef bint is_private(self) except -1:
        return self.guard is not None or type(self.driver) is TlsDriver

    cdef int goodbye(self, str reason) except -1:
        cdef bytes text = text_of(reason)[:1024] if self.extended else b""
        append_frame(self.queue, CH_EXIT, <uint8_t*>PyBytes_AS_STRING(text), len(text), NULL, 0,
                     NULL)
        self.flush()
        return 0

    @property
    def up(self):
        """Whether the handshake is complete and the session is alive."""
        return self.state == SESSION_UP

    @property
    def closed(self):
        return self.state == SESSION_CLOSED

    @property
    def queued(self):
        """Bytes that wait to be sent."""
        return self.queue.queued

    @property
    def subscribed(self):
        """The channels that the peer subscribes to, as a frozenset."""
        return frozenset(self.channels)

    @property
    def is_extended(self):
        """Whether the peer understands what the original protocol lacks."""
        return self.extended

    @property
    def is_guest(self):
        return self.role == ROLE_GUEST

    @property
    def is_lane(self):
        """Whether it is one of several connections of a session, and not the first."""
        return self.main is not None

    @property
    def connections(self):
        """The connections of this session, itself the first."""
        return connections_of(self)

    @property
    def certificate(self):
        """What the peer's certificate says, as ``ssl.SSLSocket.getpeercert()`` has it; None
        without TLS, and before its handshake is complete.
        """
        return None if self.driver is None else self.driver.certificate

    @property
    def descriptor(self):
        """The descriptor, for tests and diagnosis; -1 once closed."""
        return -1 if self.driver is None else self.driver.fd

    def drained(self, *, bint everything=False):
        """A future that is done once the queue is below the low water mark (or empty), and the
        limits let something pass.

        It fails with PeerLost when the session goes first, or the peer has ended a part of it.
        """
        cdef double wait
        future = self.engine.loop.create_future()
        if self.state == SESSION_CLOSED or is_parting(self):
            future.set_exception(self.lost_error())
            return future
        limit = 0 if everything else self.router.low_water
        wait = seconds_to_wait(self) if self.limited and limit else 0.0
        if self.is_drained(limit, wait):
            future.set_result(None)
        else:
            self.draining = True
            note_shortage(self)
            if len(self.room_waiters) >= 64:
                self.room_waiters = [waiter for waiter in self.room_waiters
                                     if not waiter[1].done()]
            self.room_waiters.append((limit, future))
            self.look_again(wait)
        return future

    cdef bint is_drained(self, size_t limit, double wait) noexcept:
        # Down to `limit`; above 0, there is room for more as well, and the limits let it pass.
        if self.waiting is not None:
            return False
        if limit == 0:
            return self.queue.queued == 0
        return self.queue.queued <= limit and wait <= 0.0 and has_room(self)

    cdef int look_again(self, double wait) except -1:
        # For who waits for the limits, whom no flush will wake.
        if wait > 0.0 and not self.looking:
            self.looking = True
            self.router.call_later(wait, self.look_for_room)
        return 0

    def part(self):
        """Wait no longer for a peer that has ended some of its connections to end the rest."""
        self.fail(self.parting)

    def look_for_room(self):
        """Tell those who wait that there is room, if there is."""
        self.looking = False
        if self.state != SESSION_CLOSED:
            self.wake_drained()

    def probe(self):
        """Ask the peer whose circuit is open whether it is there."""
        probe_peer(self.router, self)

    def tell_slow(self, size_t queued):
        """Say that the queue was full, by then of so many bytes."""
        if self.state == SESSION_CLOSED:
            return
        log.warning("%s (%s) is slow: %d bytes wait for it, and its queue is full",
                    f"node {self.peer}" if self.peer >= 0 else "a guest", self.address, queued,
                    extra={"domi_peer": self.peer, "domi_address": self.address})
        if self.state != SESSION_CLOSED:        # by who heard of it
            self.router.mesh.overloaded(self, queued)

    @property
    def phi(self):
        """How sure it is by now that the peer is dead: -log10 of the chance that it is not."""
        if self.state == SESSION_CLOSED:
            return INFINITY
        if self.state != SESSION_UP or self.role == ROLE_LOOPBACK:
            return 0.0
        if self.holding:
            hear_unread(self, monotonic_ns())
        silent = (monotonic_ns() - min(monotonic_ns(), self.last_heard)) * 1e-9
        return max(0.0, phi_at((silent - self.interval_mean) / spread(self)))

    @property
    def circuit(self):
        """``closed``, ``open`` or ``half-open``: whether the peer is left alone."""
        return CIRCUITS[CIRCUIT_CLOSED if self.breaker is None else self.breaker.state]

    cdef int wake_drained(self) except -1:
        cdef list waiting
        cdef double wait = 0.0
        if self.waiting is not None and self.state != SESSION_CLOSED:
            self.draining = False       # until they are sent: what flushes meanwhile wakes nobody
            send_waiting(self)
        waiting = self.room_waiters
        if (self.limited and (waiting or self.waiting is not None)
                and self.state != SESSION_CLOSED):
            wait = seconds_to_wait(self)
        self.room_waiters = []
        for limit, future in waiting:
            if future.done():
                continue
            if self.state == SESSION_CLOSED or is_parting(self):
                future.set_exception(self.lost_error())
            elif self.is_drained(limit, wait):
                future.set_result(None)
            else:
                self.room_waiters.append((limit, future))
        self.draining = bool(self.room_waiters) or self.waiting is not None
        if self.draining and self.state != SESSION_CLOSED:
            note_shortage(self)
            if self.waiting is not None and self.limited and has_room(self):
                # The limits may let pass by now what they did not a moment ago.
                wait = max(wait, 1e-3)
            self.look_again(wait)
        return 0

    cdef object lost_error(self):
        who = f"node {self.peer}" if self.peer >= 0 else "the guest"
        reason = self.reason or main_of(self).parting or "closed"
        return errors.PeerLost(f"{who} ({self.address}) is gone: {reason}",
                               peer=self.peer if self.peer >= 0 else None)

    # ------------------------------------------------------------------------------------- sending

    cdef bint find_room(self, uint16_t channel, size_t length, const uint8_t* extend,
                        uint16_t extend_size) except -1:
        # Whether a frame may be queued after all; if not, it is dropped. A method, as
        # refuse_rate(): a function that is called once would become a part of write_frame(), which
        # would then be too large to become a part of put().
        return make_room(self, channel, length, asks_for_answer(
            extend, extend_size, 2 if self.role == ROLE_GUEST else 0))

    cdef int refuse_rate(self, uint16_t channel) except -1:
        return refuse_for_rate(self, channel)

    cdef int put(self, uint16_t channel, object data, const uint8_t* extend,
                 uint16_t extend_size) except -1:
        return write_data(self, channel, data, extend, extend_size)

    cdef int put_view(self, uint16_t channel, object data, const uint8_t* extend,
                      uint16_t extend_size) except -1:
        cdef Py_buffer view
        get_view(data, &view)
        try:
            return write_frame(self, channel, <uint8_t*>view.buf, <size_t>view.len, extend,
                               extend_size, NULL)
        finally:
            PyBuffer_Release(&view)

    cdef int put_failure(self, uint16_t channel, bytes data, const uint8_t* extend,
                         uint16_t extend_size) except -1:
        # What tells a peer that something failed has a quarter of the queue limit on top of it: a
        # request that was refused because the queue is full ends all the same.
        if self.state == SESSION_CLOSED:
            raise self.lost_error()
        data = data[:min(<uint32_t>FAILURE_TEXT,
                         self.router.frame_limit - HEADER - extend_size)]
        if not has_room_on_top(self):
            raise errors.Overloaded(f"too much waits for node {self.peer}", channel=channel,
                                    peer=self.peer, limit=self.room)
        append_frame(self.queue, channel, <uint8_t*>PyBytes_AS_STRING(data), len(data), extend,
                     extend_size, <PyObject*>data)
        self.frames_out += 1
        self.engine.mark_dirty(self)
        return 0

    cdef int answer_is_lost(self, uint64_t correlation) noexcept:
        # From wherever the last reference to a context went, which may be another thread.
        try:
            if self.engine.thread == 0:
                return 0        # a forked child's copy: the parent has the context still
            if thread_here() == self.engine.thread:
                self.engine.call_soon(self.answer_with_none, correlation)
            else:
                self.engine.call_soon_threadsafe(self.answer_with_none, correlation)
        except RuntimeError:
            pass        # the loop is closed
        return 0

    def answer_with_none(self, uint64_t correlation):
        """End a request whose context was let go of unanswered."""
        cdef uint8_t extend[ANSWER_EXTEND]
        if self.state != SESSION_UP:
            return
        self.router.count("handlers_without_answer")
        store64(extend, correlation)
        extend[8] = STATUS_REMOTE_ERROR
        try:
            self.put_failure(CH_ANSWER, b"NoAnswer\0nobody is left to answer", extend,
                             ANSWER_EXTEND)
        except (errors.PeerLost, errors.Overloaded):
            self.router.count("answers_lost")

    cdef int control(self, uint16_t channel, bytes data) except -1:
        # The library's own small frames: a full queue does not raise, but it holds no more.
        if self.state != SESSION_CLOSED and has_room_on_top(self):
            append_frame(self.queue, channel, <uint8_t*>PyBytes_AS_STRING(data), len(data), NULL,
                         0, NULL)
            self.engine.mark_dirty(self)
        return 0

    cdef int flush(self) except -1:
        cdef Py_ssize_t n
        cdef size_t budget = 1048576
        if self.driver is None:
            return self.flush_local()
        if self.driver.writing or self.state == SESSION_CLOSED or is_parting(self):
            return 0
        while self.queue.queued:
            n = self.driver.send(self.queue)
            if self.state == SESSION_CLOSED:
                return 0        # by what the ssl module ran
            if n < 0:
                if n != -EAGAIN:
                    self.send_failed(-n)
                    return 0
                self.driver.want_write(self.on_writable)
                break
            self.bytes_out += n
            self.queue.consume(n)
            if self.engine.busy_ns and self.frames_out != self.frames_flushed:
                self.frames_flushed = self.frames_out
                self.engine.poll_on(self)
            if <size_t>n >= budget:
                self.driver.want_write(self.on_writable)
                break
            budget -= n
        return self.has_flushed()

    cdef int has_flushed(self) except -1:
        if self.queue.queued <= self.router.low_water:
            self.slow = False
        if self.room > ROOM_LEAST and (
                self.queue.queued == 0 or self.room > self.queue.queued + 2 * ROOM_STEP):
            shrink_room(self, self.queue.queued + ROOM_STEP if self.queue.queued else 0)
        if self.draining:
            self.wake_drained()
        return 0

    cdef int send_failed(self, int error) except -1:
        # Answers that arrived before the failure are still in the kernel: read them first, then
        # the end of the stream ends the session.
        if self.broken == 0:
            self.broken = error
            self.engine.call_soon(self.on_readable)
        return 0

    cdef int flush_local(self) except -1:
        # The node's frames to itself take the same way as all others, without a socket.
        cdef RawFrame frame
        cdef size_t length
        # To send to many takes longer than a quantum: then there is as much time for what comes
        # next, which is for the same many, and goes out together.
        cdef uint64_t quanta = 1 + self.engine.flushed // SENDS_A_QUANTUM
        cdef uint64_t until = monotonic_ns() + min(<uint64_t>QUANTA_MOST, quanta) * QUANTUM
        if self.continuing or self.holding:
            return 0
        self.continuing = True
        try:
            while self.queue.head is not NULL and self.state == SESSION_UP and not self.holding:
                length = frame_at(self.queue.head, self.queue.head.sent, &frame)
                # There is room for its answer where it was, and it stays there until then.
                self.queue.queued -= length
                self.queue.pinned = length
                try:
                    self.frames_in += 1
                    self.router.deliver(self, &frame)
                finally:
                    Py_XDECREF(frame.owner)
                    if self.state == SESSION_UP:
                        self.queue.pinned = 0
                        self.queue.queued += length
                        self.queue.consume(length)
                if monotonic_ns() > until:
                    break
        finally:
            self.continuing = False
            if self.queue.head is not NULL and self.state == SESSION_UP and not self.holding:
                self.engine.mark_dirty(self)
        return 0 if self.state == SESSION_CLOSED else self.has_flushed()

    def writable(self):
        # May be called spuriously.
        if self.state == SESSION_CLOSED:
            return
        self.engine.enter()
        try:
            self.driver.writing = False
            self.flush()
            if not self.driver.writing:
                self.driver.stop_write()
        finally:
            self.engine.leave()

    # ------------------------------------------------------------------------------------- reading

    def readable(self):
        self.read_batch()

    cdef int read_batch(self) except -1:
        if self.state == SESSION_CLOSED or self.continuing:
            return 0
        if self.engine.depth:
            return self.go_on()
        self.engine.enter()
        try:
            self.read_some()
        finally:
            self.engine.leave()
        return 0

    def continue_reading(self):
        if self.holding:
            return              # go_on_reading() asks for another
        self.continuing = False
        self.readable()

    cdef int go_on(self) except -1:
        if not self.continuing:
            self.continuing = True
            self.engine.call_soon(self.continue_reading)
        return 0

    cdef int hold_reading(self) except -1:
        # Called for a frame that is being delivered, which is the last one until go_on_reading():
        # the next ones wait where they are. This costs the reading of others nothing.
        if self.holding or self.state == SESSION_CLOSED:
            return 0
        self.holding = True
        if self.driver is not None:
            self.unparsed = self.reader.end - self.reader.position
            self.reader.end = self.reader.position
            self.driver.stop_read()
        return 0

    cdef int read_no_more(self) except -1:
        # The stream has ended, or what has been read says that nothing follows.
        if self.reader.window is not NULL:
            return self.hold_reading()
        self.holding = True
        self.driver.stop_read()
        return 0

    cdef int go_on_reading(self) except -1:
        if not self.holding or self.parted:
            return 0
        self.holding = False
        if self.state == SESSION_CLOSED:
            return 0
        if self.driver is None:
            self.engine.mark_dirty(self)
            return 0
        self.driver.want_read(self.on_readable)
        self.engine.call_soon(self.continue_reading)
        return 0

    cdef int read_some(self) except -1:
        # One quantum of reading, in a batch.
        cdef uint64_t messages, sent
        cdef bint begun = self.cut_short
        cdef uint8_t* where
        cdef size_t size
        cdef Py_ssize_t n
        cdef bint finished = False
        try:
            if self.cut_short:
                self.engine.refresh()
                self.engine.begin_quantum(self)
                self.reader.open_tail()
                self.parse()
            while not self.cut_short and self.state != SESSION_CLOSED:
                self.reader.room(self.engine.buffer, RECEIVE_BUFFER, &where, &size)
                n = self.driver.recv(where, size)
                if n <= 0:
                    finished = True
                    if n == -EAGAIN:
                        if self.driver.heard:
                            self.driver.heard = False
                            self.last_heard = self.engine.refresh()
                        if self.broken:
                            end_connection(self, f"cannot send: {os.strerror(self.broken)}")
                    else:
                        self.stop_for(n)
                    break
                self.last_heard = self.engine.refresh()
                if not begun:
                    begun = True
                    self.engine.begin_quantum(self)
                self.bytes_in += n
                self.reader.received(self.engine.buffer, n)
                messages = self.frames_in - self.beats_in
                sent = self.frames_out
                self.parse()
                messages = self.frames_in - self.beats_in - messages
                if self.engine.busy_ns and messages:
                    self.engine.poll_on(self)
                    if self.frames_out - sent < messages:
                        self.engine.turn_due = True
                if <size_t>n < size:
                    # Probably all there was: answers go out before the kernel is asked again.
                    self.engine.flush_dirty()
                # A peer that answers while it is being answered would never let go.
                if self.engine.slice_is_over(self.engine.now):
                    break
        finally:
            if self.holding:
                self.continuing = True
            elif not finished and self.state != SESSION_CLOSED:
                self.go_on()
        return 0

    cdef int parse(self) except -1:
        # Deliver the whole frames of the open window, until the session has had its quantum.
        cdef RawFrame frame, whole
        cdef FrameReader reader = self.reader
        cdef Router router = self.router
        cdef uint64_t before = 0, now
        cdef int left = CLOCK_EVERY, stride = CLOCK_EVERY
        self.cut_short = True
        self.engine.parsed = <PyObject*>reader
        try:
            while reader.next(&frame):
                self.frames_in += 1
                try:
                    if self.state == SESSION_UP:
                        router.deliver(self, &frame)
                    else:
                        self.handshake_frame(&frame)
                finally:
                    Py_XDECREF(frame.owner)
                left -= 1
                while left > 0 and self.state == SESSION_UP and next_whole(reader, &whole):
                    self.frames_in += 1
                    deliver_whole(router, self, &whole)
                    left -= 1
                if self.state == SESSION_CLOSED:
                    break
                if left <= 0:
                    now = monotonic_ns()
                    if self.engine.slice_is_over(now):
                        return 0
                    if self.state == SESSION_CLOSED:
                        break
                    self.engine.parsed = <PyObject*>reader
                    # Slow handlers: look at the clock after each; quick ones: not so often.
                    if before:
                        stride = (1 if now - before > 20000
                                  else CLOCK_EVERY if now - before > 2000 else 2 * CLOCK_EVERY)
                    before = now
                    left = stride
            self.cut_short = self.holding
        finally:
            self.engine.parsed = NULL
            if self.state == SESSION_CLOSED:
                reader.position = reader.end
                reader.close_window()
                reader.drop()
            else:
                reader.end += self.unparsed
                self.unparsed = 0
                reader.close_window()
        if reader.fault is not NULL and self.state != SESSION_CLOSED:
            self.fail(reader.fault.decode(), True)
        return 0

    # ----------------------------------------------------------------------------------- handshake

    cdef int handshake_frame(self, RawFrame* frame) except -1:
        cdef bytes data = PyBytes_FromStringAndSize(<char*>frame.data, frame.size)
        cdef bytes extend = PyBytes_FromStringAndSize(<char*>frame.extend, frame.extend_size)
        cdef int peer
        try:
            if self.is_guarded():
                self.authenticate(frame.channel, data, extend)
            elif frame.channel == CH_EXIT and self.state != SESSION_MAGIC:
                self.fail(f"refused: {said_by_peer(data[:1024])}" if data else "refused")
            elif self.state == SESSION_MAGIC and frame.channel == CH_NODE_NAME:
                if frame.size != 2:
                    raise errors.FrameError("a node name that is not two bytes")
                peer = load16(frame.data)
                if peer >= MAX_MACHINES:
                    raise errors.FrameError(f"machine id {peer}: ids are 0-1023")
                welcome = self.router.mesh.admit(self, peer, extend)
                self.peer = peer
                self.reader.limit = self.router.frame_limit
                if welcome is None:
                    self.rise()
                else:
                    self.extended = True
                    self.state = SESSION_EXAMINED
                    if welcome:
                        self.welcome(welcome)
            elif self.state == SESSION_MAGIC and frame.channel == CH_GUEST_NAME:
                welcome = self.router.mesh.admit_guest(self, data)
                self.role = ROLE_GUEST
                self.extended = True
                self.reader.limit = self.router.frame_limit
                self.control(CH_WELCOME, welcome)
                self.rise()
            elif self.state == SESSION_MAGIC and frame.channel == CH_LANE:
                self.take_lane(data, extend)
            elif self.state == SESSION_NAMED and frame.channel == CH_SUBSCRIPTIONS:
                if misses_lanes(self):
                    raise errors.FrameError("a session that is confirmed before its lanes are here")
                self.router.mesh.confirm(self)
                self.rise()
                if self.state == SESSION_UP:
                    self.router.deliver(self, frame)
            elif self.state == SESSION_DIALLED and frame.channel == CH_WELCOME:
                self.extended = True
                peer = self.router.mesh.welcomed(self, data)
                if not 0 <= peer < MAX_MACHINES:
                    raise errors.FrameError(f"machine id {peer}: ids are 0-1023")
                if self.state == SESSION_CLOSED:
                    return 0
                self.peer = peer
                if self.lanes is None:
                    self.rise()
                else:
                    self.state = SESSION_WELCOMED
            elif (self.state == SESSION_DIALLED and frame.channel == CH_LANE
                    and self.role == ROLE_DIALLER):
                if data or extend:
                    raise errors.FrameError("a lane that is taken with more than a word")
                main, index = self.router.mesh.lane_taken(self)
                join_lane(main, self, index)
                if not misses_lanes(main):
                    (<Session>main).rise()
            else:
                raise errors.FrameError(
                    f"a frame on channel {frame.channel} before the handshake is complete",
                    channel=frame.channel)
        except Exception as error:
            if self.state == SESSION_CLOSED:
                return 0
            if not isinstance(error, errors.DomiError):
                log.error("the handshake with %s failed", self.address, exc_info=error)
            if self.state == SESSION_MAGIC and not self.is_guarded():
                self.extended = bool(extend) or frame.channel == CH_GUEST_NAME
            self.refuse(error)
        return 0

    cdef int take_lane(self, bytes data, bytes extend) except -1:
        main, index = self.router.mesh.admit_lane(self, data, extend)
        join_lane(main, self, index)
        return self.control(CH_LANE, b"")

    cdef bint is_guarded(self) except -1:
        return self.guard is not None and not self.guard.passed

    cdef int authenticate(self, int channel, bytes data, bytes extend) except -1:
        # A frame of a peer that has yet to show that it belongs here. It is told nothing of why it
        # is refused.
        cdef bytes answer
        if channel == CH_EXIT and self.role != ROLE_ACCEPTOR:
            return self.fail("refused before it was authenticated")
        if channel == CH_EXIT:
            return self.fail("it left before it was authenticated")
        if channel != CH_AUTH or extend:
            raise errors.AuthError(
                f"a frame on channel {channel}, and it has not shown that it knows the secret",
                channel=channel)
        if self.driver.binding is not None:
            self.guard.binding = self.driver.binding
        answer = self.guard.step(data)
        if answer:
            self.control(CH_AUTH, answer)
        if self.guard.passed:
            self.reader.limit = (
                HANDSHAKE_LIMIT if self.role == ROLE_ACCEPTOR else self.router.frame_limit)
            self.say_name()
        return 0

    cdef int stop_for(self, Py_ssize_t result) except -1:
        # There is nothing more to read: 0, the stream has ended; otherwise -errno.
        if result == 0:
            return end_connection(self, self.end_of_stream())
        if self.driver.fault is None:
            return end_connection(self, f"the connection broke: {os.strerror(-result)}")
        self.refuse(self.driver.fault)
        return 0

    cdef str end_of_stream(self):
        # The reason, with what may be behind it.
        cdef list asked = []
        if self.state != SESSION_DIALLED and not self.is_guarded():
            return "the peer closed the connection"
        tls = type(self.driver) is TlsDriver
        asked.append("has it TLS, and does it take this certificate" if tls
                     else "does it ask for TLS")
        asked.append("has it this secret" if self.is_guarded() else "does it ask for a secret")
        return f"the peer closed the connection within the handshake: {'; '.join(asked)}?"

    cdef int rise(self) except -1:
        # The handshake is complete.
        self.state = SESSION_UP
        self.guard = None
        self.engine.wheel.remove(&self.heartbeat.node)
        begin_beats(self)
        return self.router.attach(self)

    # ------------------------------------------------------------------------------ life and death

    cdef int fail(self, object reason, bint protocol=False) except -1:
        cdef int state = self.state
        cdef WriteQueue unsent = self.queue
        cdef Session alive = self       # the table that this leaves may hold the last reference
        cdef list lanes = self.lanes
        if state == SESSION_CLOSED:
            return 0
        if self.main is not None and self.main.state != SESSION_CLOSED:
            return self.main.fail(reason, protocol)
        self.state = SESSION_CLOSED
        self.reason = reason
        self.lanes = None
        if self.parting_timer is not None:
            self.parting_timer.cancel()
            self.parting_timer = None
        self.guard = self.naming = None
        self.engine.wheel.remove(&self.heartbeat.node)
        if self.driver is not None:
            self.driver.close()
            if self.reader.window is NULL:
                self.reader.drop()
        self.queue = WriteQueue()
        if self.driver is None and unsent.pinned:
            unsent.head.sent += unsent.pinned   # its handler runs: it is not lost
        forget_all(self)
        shrink_room(self, 0)
        self.engine.spare = None        # it may lead here
        if self.breaker is not None and self.breaker.timer is not None:
            self.breaker.timer.cancel()
            self.breaker.timer = None
        self.on_readable = self.on_writable = None
        if self.room_waiters:
            self.wake_drained()
        try:
            self.router.session_lost(self, state == SESSION_UP, protocol, unsent)
        finally:
            self.router = None
            if lanes is not None:
                fail_lanes(lanes, 1, reason)
            self.main = None
        return 0
