# One router a node: channels, peers, and how each verb is sent.
#
# Invariants: a closed session stands in no route, no peer slot and no request. Owned by the loop
# thread.

cdef enum:
    SLOT_BITS = 20
    SLOT_MASK = (1 << SLOT_BITS) - 1
    STAGE_EXTEND = 256          # extends up to this size are built on the stack


cdef bint is_request(bytes extend) noexcept:
    return len(extend) == REQUEST_EXTEND and extend[0] == TAG_REQUEST


cdef int machine_of(object machine) except -1:
    # What a program gives as a machine id; one that no node can have becomes MAX_MACHINES.
    cdef long number = small_int(machine)
    if number < 0 and (not PyLong_Check(machine) or PyBool_Check(machine)):
        raise TypeError(f"machine id {machine!r}: an int of 0-1023 is wanted")
    return <int>number if 0 <= number < MAX_MACHINES else MAX_MACHINES


cdef inline Session pick(Router router, int number, object to, bint keyless):
    # The session that a message on this channel goes to next.
    router.require_engine()
    if to is None and router.channels[number].route is not NULL:
        if router.balanced:
            return choose_session(router, number, None, None, keyless)
        return route_next(router.channels[number].route)
    return router.pick_named(number, to)


@cython.final
cdef class Router:
    """Channels, peers and verbs of one node (or of a guest, which has a node for an uplink).

    :param heartbeat: seconds between heartbeats, 0.1 or more.
    :param silence: seconds without a byte after which a peer is lost.
    :param phi: how sure it must be that a peer is dead for it to be lost before; None: it is not.
    :param handshake: seconds within which a handshake must be complete.
    :param timeout: seconds: the default of :meth:`request`.
    :param queue_limit: bytes that may wait for one peer before sending raises Overloaded.
    :param node_queue_limit: bytes that may wait for all peers together, beyond 64 KiB for each.
    :param channel_limit: channels that are subscribed here, or by one peer.
    :param subscriber_limit: guests that subscribe to one channel.
    :param handler_limit: tasks of ``async def`` handlers at a time.
    :param when_full: what is done then, as :meth:`when_full` takes it.
    :param frame_limit: largest frame in bytes, header included.
    :param busy_poll: seconds that the loop comes round without blocking after the last traffic.
    """

    def __cinit__(self, *, double heartbeat=5.0, double silence=10.0, double handshake=2.0,
                  double timeout=5.0, size_t queue_limit=16777216, uint32_t frame_limit=16777216,
                  phi=None, double busy_poll=0.0, on_error=None, size_t node_queue_limit=268435456,
                  when_full="raise", uint32_t channel_limit=16384, uint32_t handler_limit=65536,
                  uint32_t subscriber_limit=16384):
        self.id = -1
        self.heartbeat_ns = <uint64_t>(heartbeat * 1e9)
        self.silence_ns = <uint64_t>(silence * 1e9)
        self.phi_deviations = INFINITY if phi is None else deviations(phi)
        self.handshake_ns = <uint64_t>(handshake * 1e9)
        self.timeout = timeout
        self.queue_limit = queue_limit
        self.low_water = queue_limit // 4
        self.node_queue_limit = max(node_queue_limit, queue_limit)
        self.full_default = full_policy(when_full)
        self.channel_limit = channel_limit
        self.subscriber_limit = subscriber_limit
        self.handler_limit = handler_limit
        self.short_of_room = []
        self.full_channels = {}
        self.full_peers = {}
        self.drop_counts = {}
        self.lingering = []
        self.linger_time = LINGER_TIME
        self.frame_limit = frame_limit
        self.busy_ns = <uint64_t>(busy_poll * 1e9)
        self.on_error = on_error
        self.guests = {}
        self.policies = {}
        self.named_policies = {}
        self.default_policies = {}
        self.by_key = KeyHash()
        self.own_memory = -1
        self.totals = {}
        self.tasks = set()
        self.reporters = []
        self.channels = <ChannelEntry*>calloc(MAX_CHANNELS, sizeof(ChannelEntry))
        self.peers = <PyObject**>calloc(MAX_MACHINES, sizeof(PyObject*))
        if self.channels is NULL or self.peers is NULL:
            raise MemoryError

    def __dealloc__(self):
        cdef uint32_t i
        if self.channels is not NULL:
            for i in range(<uint32_t>MAX_CHANNELS):
                Py_XDECREF(self.channels[i].handler)
                free_route(self.channels[i].route)
                free_route(self.channels[i].guests)
            free(self.channels)
        if self.peers is not NULL:
            for i in range(<uint32_t>MAX_MACHINES):
                Py_XDECREF(self.peers[i])
            free(self.peers)
        for i in range(self.slot_count):
            Py_XDECREF(self.slots[i])
        free(self.slots)
        free(self.generations)
        free(self.free_slots)

    # ------------------------------------------------------------------------- life, for the mesh

    def start(self, mesh):
        """Begin on the running loop. ``mesh`` decides about handshakes and hears of losses."""
        self.engine = engine_of(asyncio.get_running_loop())
        self.engine.acquire()
        self.polls = self.engine.start_polling(self.busy_ns)
        self.mesh = mesh

    def identify(self, int machine):
        """Take (or change) the machine id; the node can talk to itself from now on."""
        cdef int channel
        if not 0 <= machine < MAX_MACHINES:
            raise ValueError(f"machine id {machine}: ids are 0-1023")
        if self.loopback is not None:
            self.loopback.fail("the node has another machine id now")
        if self.peers[machine] is not NULL:
            (<Session><object>self.peers[machine]).fail("the machine id is this node's own now")
        self.id = machine
        self.loopback = Session(self, -1, ROLE_LOOPBACK, "itself", peer=machine)
        self.loopback.candidate = Candidate(machine)
        if self.own_memory >= 0:
            self.loopback.candidate.memory = self.own_memory * 0.001
        self.peers_set(machine, self.loopback)
        for channel in range(MAX_CHANNELS):
            if is_local(self, channel):
                route_here(self, channel)

    def enter_state(self, int state):
        """Take new work (``STATE_SERVING``), or none; the peers are told.

        While ``unheard`` of a session is not 0, what its peer sent before may still arrive.
        """
        cdef Session session
        cdef int channel
        self.require_engine()
        self.state = state
        for channel in range(MAX_CHANNELS):
            if self.loopback is not None and is_local(self, channel):
                if state == STATE_SERVING:
                    route_add(&self.channels[channel].route, self.loopback)
                else:
                    route_remove(&self.channels[channel].route, self.loopback)
        for session in self.connections():
            if (session.extended and session.role in (ROLE_DIALLER, ROLE_ACCEPTOR)
                    and not is_parting(session)):
                say_state(self, session)
                session.flush()
        self.mesh.routes_changed()

    def balance(self, channel, policy):
        """Choose by this policy from now on whom the messages on a channel go to.

        :param channel: an int; None for every channel that has no policy of its own.
        :param policy: as :func:`policy_of` takes it; None takes the policy off. Each channel has
            its own state of one that goes by a name; an object is the same for all.
        """
        cdef CorePolicy core = None if policy is None else policy_of(policy)
        if channel is None:
            self.policy = policy
            self.default_policies.clear()
        elif core is None:
            self.policies.pop(channel_number(channel), None)
        else:
            self.policies[channel_number(channel)] = core
        self.balanced = self.policy is not None or len(self.policies) > 0
        self.measures |= self.balanced

    cdef object chosen(self, int channel, object to, object key, object policy):
        self.require_engine()
        return self.choose_peer(channel, to, key, policy)

    cdef object choose_peer(self, int channel, object to, object key, object policy):
        # From any thread, with the GIL held, while the node runs.
        cdef CorePolicy core = None
        if to is not None:
            raise ValueError(
                "to= names the node, and key= and policy= would choose it: give one of them")
        if self.uplink is not None:
            raise errors.DomiError(
                "a guest's node chooses by its own policies: key= and policy= are for nodes",
                channel=channel)
        self.measures = True
        if isinstance(policy, str):
            core = self.named_policies.get((channel, policy))
            if core is None:
                core = self.named_policies[channel, policy] = policy_of(policy)
        elif policy is not None:
            core = policy_of(policy)
        return choose_session(self, channel, core, key, False).peer

    def protect(self, failures, double window, double pause):
        """Leave a peer alone that has left requests without an answer, until it answers a ping.

        :param failures: how many within ``window`` seconds; 0 switches it off.
        :param pause: seconds before a ping, and between two.
        """
        self.breaker_failures = failures
        self.breaker_window = <uint64_t>(window * 1e9)
        self.breaker_pause = <uint64_t>(pause * 1e9)

    def limit(self, node, peer):
        """Send no more than that: pairs (bytes a second, bytes at once) for all peers together and
        for each; None for no limit. Before the start."""
        self.limiter = None if node is None else Limiter(*node)
        self.peer_rate, self.peer_size = (0.0, 0.0) if peer is None else peer

    def choose(self, channel, *, key=None, policy=None):
        """The machine id of the subscriber to which a message on the channel would go now.

        Raises as ``notify`` does when there is none.
        """
        return self.chosen(channel_number(channel), None, key, policy)

    def when_full(self, policy, *, channel=None, peer=None):
        """What is done from now on with a message for a peer whose queue is full.

        :param policy: ``raise``, ``drop_oldest``, ``drop_newest`` or ``disconnect``; None, of a
            channel or a peer, takes its own off.
        :param channel: of this channel, whoever the peer; :param peer: for the node of this machine
            id, on channels that have no policy of their own. Neither: for all others.
        """
        cdef object code = None if policy is None else full_policy(policy)
        cdef dict table
        cdef Session session
        if channel is not None and peer is not None:
            raise ValueError("a policy is of a channel or of a peer: give one of them")
        if channel is None and peer is None:
            if code is None:
                raise ValueError("when_full None: of all peers, one of the policies is wanted")
            self.full_default = code
        else:
            table = self.full_peers if channel is None else self.full_channels
            key = channel_number(channel) if peer is None else machine_of(peer)
            if key == MAX_MACHINES and peer is not None:
                raise ValueError(f"machine id {peer}: ids are 0-1023")
            if code is None:
                table.pop(key, None)
            else:
                table[key] = code
        for session in self.connections() + ([] if self.loopback is None else [self.loopback]):
            session.when_full = self.full_peers.get(session.peer, self.full_default)

    def drops(self):
        """How many messages were dropped because their receiver was slow, as
        ``{(machine id, channel): count}``; a guest's are under -1."""
        self.add_up()
        return dict(self.drop_counts)

    def use_memory(self, double share):
        """This node uses that share of its memory, 0-1; the peers are told when it has changed."""
        cdef Session session
        cdef int used = <int>(min(max(share, 0.0), 1.0) * 1000.0 + 0.5)
        if share > MEMORY_FULL and not is_full(used):
            used += 1
        if self.loopback is not None:
            self.loopback.candidate.memory = used * 0.001
        if (self.own_memory >= 0 and abs(used - self.own_memory) < MEMORY_STEP
                and is_full(used) == is_full(self.own_memory)):
            return
        self.own_memory = used
        for session in self.sessions():
            if session.extended and session.role in (ROLE_DIALLER, ROLE_ACCEPTOR):
                say_memory(self, session)
                session.flush()

    def unfinished(self):
        """Requests whose handlers have returned without an answer, and those that this node has
        sent, for itself or for others, and that have not ended: how many."""
        cdef Session session
        cdef uint64_t count = self.slot_count - self.free_count
        for session in self.connections() + ([] if self.loopback is None else [self.loopback]):
            count += session.owed
        return count

    def stop(self, str reason not None):
        """Close every session and drop the handlers; what is in flight ends with PeerLost."""
        cdef Session session
        self.stopped = f"{reason}: it takes no more subscriptions"
        self.forget_handlers()
        if self.engine is None:
            return
        for session in self.sessions():
            session.close(reason)
        if self.loopback is not None:
            self.loopback.fail(reason)
        self.end_lingers()
        if self.polls:
            self.engine.stop_polling(self.busy_ns)
        self.engine.release()
        self.engine = None
        self.mesh = None

    def abandon(self, contexts):
        """Refuse what nobody will take any more: as if its channel had no handler."""
        for context in contexts:
            if not isinstance(context, Context):
                raise TypeError(f"{context!r} is not a Context")
            self.count("dropped_no_subscriber")
            self.reject_context(context, STATUS_NO_SUBSCRIBER)

    cdef int reject_context(self, Context context, uint8_t status) except -1:
        # reject(), for a frame that has become a context.
        cdef bytes data
        cdef RawFrame frame
        cdef int prefix = 2 if context.origin >= 0 else 0   # what a node puts before the extend
        if context.is_owed():
            return answer_failure(self, context, status, b"")
        if context.kind == KIND_REQUEST or context.answered or context.posted:
            return 0
        data = context.data
        frame.channel = context.channel
        frame.size = <uint32_t>len(data)
        frame.data = <const uint8_t*>PyBytes_AS_STRING(data)
        frame.owner = <PyObject*>data
        frame.extend = context.extend_bytes() - prefix
        frame.extend_size = context.extend_size + prefix
        return self.reject(context.session, status, &frame)

    cdef int forget_handlers(self) except -1:
        # The collector does not see the table: a handler that leads back here would keep both.
        cdef int channel
        cdef PyObject* handler
        for channel in range(MAX_CHANNELS):
            handler = self.channels[channel].handler
            self.channels[channel].handler = NULL
            settle_entry(self, channel)
            self.handler_count -= handler is not NULL
            Py_XDECREF(handler)
        return 0

    def sessions(self):
        """All sessions with a complete handshake, guests included, without the loop-back."""
        cdef list found = list(self.guests.values())
        cdef int i
        for i in range(MAX_MACHINES):
            if self.peers[i] is not NULL and i != self.id:
                found.append(<object>self.peers[i])
        if self.uplink is not None:
            found.append(self.uplink)
        return found

    def connections(self):
        """The connections of all of these sessions."""
        return [each for session in self.sessions() for each in connections_of(session)]

    def session(self, int machine):
        """The session with this machine, or None."""
        if 0 <= machine < MAX_MACHINES and self.peers[machine] is not NULL:
            return <object>self.peers[machine]
        return None

    def unacknowledged(self):
        """How many of the closed connections still send what they were given.

        Those whose peer's machine has all of it are ended.
        """
        cdef Linger last
        for last in list(self.lingering):
            if bytes_on_their_way(last.driver.fd) == 0:
                end_linger(last)
        return len(self.lingering)

    def end_lingers(self):
        """Close the connections that were given up."""
        for last in list(self.lingering):
            end_linger(last)

    def lingers(self, int machine):
        """What is known of the peers of this machine id that were disconnected and may still be
        reading what they had been sent: the ``info`` of their sessions."""
        cdef Linger last
        return [last.info for last in self.lingering if last.peer == machine]

    def handlers(self):
        """What is subscribed here, as ``{channel: handler}``."""
        cdef int channel
        return {channel: <object>self.channels[channel].handler
                for channel in range(MAX_CHANNELS) if self.channels[channel].handler is not NULL}

    def subscribers(self, channel):
        """Machine ids of the nodes that subscribe to the channel, as far as is known here."""
        cdef Session session
        if not 0 <= channel < MAX_CHANNELS:
            raise ValueError(f"channel {channel}: a channel is 0-65535")
        return [session.peer for session in members_of(&self.channels[<int>channel].route)]

    def note(self, str counter not None):
        """Add one to a counter, for the mesh."""
        self.count(counter)

    def counters(self):
        """Totals since the start, by name; what has not happened yet is 0."""
        cdef Session session
        self.add_up()
        found = Counter(self.totals)
        cdef uint64_t frames_in = self.frames_in, frames_out = self.frames_out
        cdef uint64_t bytes_in = self.bytes_in, bytes_out = self.bytes_out
        for session in self.connections() + ([] if self.loopback is None else [self.loopback]):
            frames_in += session.frames_in
            frames_out += session.frames_out
            bytes_in += session.bytes_in
            bytes_out += session.bytes_out
        found.update(frames_in=frames_in, frames_out=frames_out, bytes_in=bytes_in,
                     bytes_out=bytes_out, in_flight=self.slot_count - self.free_count)
        return found

    def handler_tasks(self):
        """Tasks of ``async def`` handlers that have not finished."""
        return set(self.tasks)

    def call_later(self, double delay, callback):
        """Call ``callback()`` on the loop in ``delay`` seconds, by the wheel; a :class:`Timer`."""
        self.require_engine()
        cdef TimeWheel wheel = self.engine.wheel
        timer = wheel.once(<double>monotonic_ns() * 1e-9 + min(max(0.0, delay), 1e9), callback)
        self.engine.arm()
        return timer

    def drained(self, peer):
        """A future that is done once there is room to send to ``peer``.

        It fails with PeerLost when the peer goes first. Raises PeerLost when it is not there.
        """
        cdef Session session
        self.require_engine()
        session = self.uplink if self.uplink is not None else self.session_to(peer)
        if session.lanes is None:
            return session.drained()
        return asyncio.ensure_future(drained_lanes(session.lanes), loop=self.engine.loop)

    # ------------------------------------------------------------------------------- subscriptions

    def subscribe(self, channel, handler=..., *, bint batch=False):
        """Have ``handler(context)`` called for every message on ``channel``.

        :param channel: 50-65499, or a member of ``LibraryChannel`` that the core does not serve.
        :param handler: ``def`` (runs at once, inside the read; it must not block) or ``async def``
            (becomes a task). Without it, this is a decorator.
        :param batch: call ``handler(contexts)`` with a list instead, of what one read of the loop
            brings on the channel, at most 256 at a time. ``def`` only.
        :raises ValueError: the channel is not one that may be subscribed.
        :raises DomiError: the channel has a handler already.
        """
        cdef int number = channel_number(channel)
        self.check_open()
        if handler is ...:
            return lambda function: self.subscribe(channel, function, batch=batch) or function
        if batch:
            check_plain_handler(handler, "what takes lists runs to its end at once")
            taker = BatchChannel.__new__(BatchChannel)
            (<BatchChannel>taker).router = self
            (<BatchChannel>taker).handler = handler
            (<BatchChannel>taker).channel = number
            (<BatchChannel>taker).contexts = []
            self.install(number, taker)
            return
        if not callable(handler):
            raise TypeError(f"handler {handler!r} is not callable")
        if is_generator_function(handler):
            raise TypeError(
                f"handler {handler!r} is a generator, which nobody would run: use def or async def")
        self.install(number, handler)

    cdef int install(self, int number, object handler) except -1:
        # The one handler of the channel, from now on.
        cdef ChannelEntry* entry = &self.channels[number]
        self.check_open()
        if entry.handler is not NULL:
            raise is_taken(self, number, None)
        if self.handler_count >= self.channel_limit:
            self.count("refused_channels")
            raise errors.Overloaded(
                f"{self.handler_count} channels have a handler, as many as a node may subscribe to "
                "(channel_limit)", channel=number, limit=self.channel_limit)
        self.handler_count += 1
        Py_INCREF(handler)
        entry.handler = <PyObject*>handler
        entry.takes = isinstance(handler, Taker)
        settle_entry(self, number)
        now_local(self, number)
        return 0

    def unsubscribe(self, channel):
        """Take the handler off the channel. What is under way to it is refused and counted.

        :raises DomiError: the channel has no handler, or that of a Serial.
        """
        cdef int number = channel_number(channel)
        cdef PyObject* handler = self.channels[number].handler
        if self.engine is not None:
            self.engine.check_thread()
        if handler is NULL:
            raise errors.DomiError(f"channel {number} has no handler", channel=number)
        if type(<object>handler) is SerialChannel:
            raise errors.DomiError(
                f"channel {number} was subscribed by a Serial: unsubscribe it there",
                channel=number)
        self.uninstall(number)

    cdef int uninstall(self, int number) except -1:
        cdef ChannelEntry* entry = &self.channels[number]
        cdef PyObject* handler = entry.handler
        self.handler_count -= 1
        entry.handler = NULL
        settle_entry(self, number)
        maybe_not_local(self, number)
        Py_DECREF(<object>handler)
        return 0

    # ----------------------------------------------------------------------------------- the verbs

    cdef int check_open(self) except -1:
        # Subscriptions may be made before the start, and not when it is over.
        if self.stopped is not None:
            raise errors.DomiError(self.stopped)
        if self.uplink_lost is not None:
            raise errors.PeerLost(f"this guest has lost its node: {self.uplink_lost}")
        if self.engine is not None:
            self.engine.check_thread()
        return 0

    cdef inline int require_engine(self) except -1:
        if (self.engine is None or (self.loopback is None and self.uplink is None)
                or thread_here() != self.engine.thread):
            self.check_running()
        return 0

    cdef int check_running(self) except -1:
        # Raises what forbids to send now and from here.
        if self.engine is not None and not (self.loopback is None and self.uplink is None):
            return self.engine.check_thread()
        if self.uplink_lost is not None:
            raise errors.PeerLost(f"this guest has lost its node: {self.uplink_lost}")
        raise errors.DomiError("not connected: call start() first, and nothing after close()")

    cdef Session session_to(self, object machine):
        cdef int number = machine_of(machine)
        if number == MAX_MACHINES or self.peers[number] is NULL:
            raise errors.PeerLost(f"no session with node {machine}", peer=machine)
        return <Session><object>self.peers[number]

    cdef Session pick_named(self, int number, object to):
        cdef Session session
        if to is None:
            if self.loopback is not None and is_local(self, number):
                return self.loopback    # it takes no new work, and nobody else has this channel
            raise no_subscriber(self, number)
        session = self.session_to(to)
        if session.parting is not None:
            raise session.lost_error()
        if not takes_work(session):
            if session.state_of_peer == STATE_SERVING:
                raise circuit_open(number, session)
            raise errors.NoSubscriber(
                f"node {to} is paused or drains, and takes no new work", channel=number, peer=to)
        if session.extended and number not in session.channels and not (
                session is self.loopback and is_local(self, number)):
            raise errors.NoSubscriber(
                f"node {to} does not subscribe to channel {number}", channel=number, peer=to)
        return session

    cdef int send_notify(self, int channel, object data, object to, bint keyless) except -1:
        if self.uplink is not None:
            return uplink_send(self, VERB_NOTIFY, channel, data, 0, to, 0, NO_DEADLINE, None)
        return lane_of(pick(self, channel, to, keyless), channel).put(
            <uint16_t>channel, data, NULL, 0)

    cdef int send_publish(self, int channel, object data, object to) except -1:
        cdef uint8_t tag = TAG_PUBLISH
        cdef Session session
        cdef uint64_t frames
        if not PyBytes_CheckExact(data):
            data = bytes_of(data)
        if self.uplink is not None:
            uplink_send(self, VERB_PUBLISH, channel, data, 0, to, 0, NO_DEADLINE, None)
            return 1
        if to is not None:
            session = lane_of(pick(self, channel, to, True), channel)
            frames = session.frames_out
            session.put(<uint16_t>channel, data, &tag, 1 if session.extended else 0)
            return session.frames_out != frames     # or it was dropped
        self.require_engine()
        return publish_to_all(self, channel, data)

    cdef int send_call(self, int number, object data, int reply, object to,
                       bint keyless) except -1:
        cdef uint8_t extend[GUEST_CALL_EXTEND]
        cdef Session session
        if self.uplink is not None:
            return uplink_send(self, VERB_CALL, number, data, reply, to, 0, NO_DEADLINE, None)
        session = lane_of(pick(self, number, to, keyless), number)
        if self.channels[reply].guests is not NULL and session.extended:
            # So that the reply is not taken for a message that a guest may have: guest 0 is the
            # node itself.
            extend[0] = TAG_GUEST_CALL
            store16(extend + 1, <uint16_t>self.id)
            store16(extend + 3, <uint16_t>reply)
            store32(extend + 5, 0)
            return session.put(<uint16_t>number, data, extend, GUEST_CALL_EXTEND)
        store16(extend, <uint16_t>self.id)
        store16(extend + 2, <uint16_t>reply)
        return write_data(session, <uint16_t>number, data, extend, 4)

    cdef object send_request(self, int channel, object data, object timeout, object to):
        cdef Session session
        cdef Request request
        if self.uplink is not None:
            self.require_engine()
            session = self.uplink
        else:
            session = lane_of(pick(self, channel, to, False), channel)
            if not session.extended:
                raise errors.DomiError(
                    f"node {session.peer} speaks the plain protocol, which has no requests: "
                    "use call", channel=channel, peer=session.peer)
        request = open_request(self, session, <uint16_t>channel, timeout)
        try:
            if session.queue.queued >= session.gate and not request_has_room(session, channel):
                await_room(self, session, request, channel, data, to)
            else:
                put_request(self, session, request, channel, data, to)
        except BaseException:
            request.release()
            raise
        return request

    cdef int send_stages(self, list channels, object data) except -1:
        cdef bytes rest = b"".join([number.to_bytes(2, "little") for number in channels[1:]])
        return self.send_stage(
            channels[0], data, <uint8_t*>PyBytes_AS_STRING(rest), <uint16_t>len(rest))

    cdef int send_stage(self, int channel, object data, const uint8_t* rest,
                        uint16_t size) except -1:
        cdef uint8_t stack[STAGE_EXTEND]
        cdef uint8_t* extend = stack
        cdef Session session
        if self.uplink is not None:
            uplink_send(self, VERB_PIPELINE, channel, data, 0, None, 0, NO_DEADLINE,
                        PyBytes_FromStringAndSize(<char*>rest, size))
            return 0
        session = lane_of(pick(self, channel, None, True), channel)
        if not session.extended:
            session.put(<uint16_t>channel, data, rest, size)
            return 0
        if <size_t>size + 1 > sizeof(stack):
            extend = <uint8_t*>malloc(<size_t>size + 1)
            if extend is NULL:
                raise MemoryError
        try:
            extend[0] = TAG_PIPELINE
            copy(extend + 1, rest, size)
            session.put(<uint16_t>channel, data, extend, size + 1)
        finally:
            if extend != stack:
                free(extend)
        return 0

    # -------------------------------------------------------------------------------- what arrives

    cdef int deliver(self, Session session, RawFrame* frame) except -1:
        cdef ChannelEntry* entry = &self.channels[frame.channel]
        if (frame.channel > USER_LAST or entry.handler is NULL or entry.guests is not NULL
                or session.role == ROLE_GUEST or frame.extend_size == GUEST_REPLY_EXTEND):
            return self.deliver_rare(session, frame)
        return self.run_handler(entry, session, frame)

    cdef int deliver_rare(self, Session session, RawFrame* frame) except -1:
        cdef ChannelEntry* entry = &self.channels[frame.channel]
        if frame.channel == CH_ANSWER:
            return handle_answer(self, session, frame)
        if frame.channel > USER_LAST:
            if handle_library(self, session, frame) and entry.handler is not NULL:
                return self.run_handler(entry, session, frame)
            return 0
        if session.role == ROLE_GUEST:
            return self.count("dropped_not_negotiated")
        if (frame.extend_size == GUEST_REPLY_EXTEND and session.extended
                and session.role != ROLE_UPLINK and frame.extend[0] == TAG_GUEST_REPLY):
            return relay_reply(self, session, frame)
        if entry.guests is not NULL:
            return deliver_shared(self, session, frame)
        if entry.handler is not NULL:
            return self.run_handler(entry, session, frame)
        self.count("dropped_no_subscriber")
        return self.reject(session, STATUS_NO_SUBSCRIBER, frame)

    cdef int run_handler(self, ChannelEntry* entry, Session session, RawFrame* frame) except -1:
        cdef Context context
        cdef Taker taker
        if entry.takes:
            taker = <Taker>entry.handler    # a handler that runs within may unsubscribe it
            return taker.accept(session, frame)
        context = take_context(session.engine)
        fill_context(context, session, frame, session.engine.now)
        call_handler(self, entry.handler, context, False)
        return put_context(session.engine, context)

    def send_failure(self, Context context not None, uint8_t status, bytes text not None):
        """Answer a request with a failure. On the loop thread."""
        try:
            context.answer(status, text)
        except (errors.PeerLost, errors.Overloaded):
            self.count("answers_lost")

    cdef int reject(self, Session session, uint8_t status, RawFrame* frame) except -1:
        # Tell the sender of a frame that nobody took it. A publish is nobody's in particular.
        cdef uint8_t out[REJECT_EXTEND]
        cdef uint8_t answer[ANSWER_EXTEND]
        # A node puts two bytes, the sender, before the extend of what it passes to a guest.
        cdef int prefix = 2 if session.role == ROLE_UPLINK else 0
        cdef int size = frame.extend_size - prefix
        cdef uint8_t tag = frame.extend[prefix] if size > 0 else 0
        if not session.extended or session.state == SESSION_CLOSED or (
                size == 1 and tag == TAG_PUBLISH):
            return 0
        try:
            if size == REQUEST_EXTEND and tag == TAG_REQUEST:
                copy(answer, frame.extend + prefix + 1, 8)
                answer[8] = status
                session.put_failure(CH_ANSWER, b"", answer, ANSWER_EXTEND)
            else:
                out[0] = status
                store16(out + 1, frame.channel)
                store16(out + 3, frame.extend_size)
                joined = (PyBytes_FromStringAndSize(<char*>frame.extend, frame.extend_size)
                          + frame_data(frame))
                session.put(CH_REJECT, joined, out, REJECT_EXTEND)
        except (errors.Overloaded, errors.FrameError, errors.PeerLost):
            self.count("rejects_lost")
        return 0

    cdef int report(self, object error, object frame) except -1:
        # What was refused after the verb had returned.
        error = as_domi_error(error, frame.channel)
        if self.on_error is None:
            log.warning("lost: %s (channel %d, %d bytes)", error, frame.channel, len(frame.data),
                        extra={"domi_channel": frame.channel, "domi_peer": error.peer})
        elif self.reporters:
            reporter = <ThreadScheduler>self.reporters[len(self.reporters) - 1]
            reporter.post(self.call_on_error, (reporter.outbound, error, frame))
        else:
            was_telling, self.telling = self.telling, True
            try:
                self.tell(error, frame)
            finally:
                self.telling = was_telling
        return 0

    def call_on_error(self, Outbound outbound, error, frame):
        """Call the program's ``on_error`` on the serial thread, which publishes through it."""
        outbound.telling = True
        try:
            self.tell(error, frame)
        finally:
            outbound.telling = False

    cdef int tell(self, object error, object frame) except -1:
        function = self.on_error
        if function is None:        # by now
            return self.report(error, frame)
        try:
            function(error, frame)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as raised:
            log.error("on_error failed", exc_info=raised)
        return 0

    cdef int count(self, str name, uint64_t by=1) except -1:
        self.totals[name] = self.totals.get(name, 0) + by
        return 0

    cdef int add_up(self) except -1:
        # What is counted in numbers of C, for it may happen with each message.
        cdef Session session
        cdef uint64_t refused = self.refused
        self.refused = 0
        if refused:
            self.count("refused_queue_full", refused)
        for session in self.connections():
            count_drops(session)
        return 0 if self.loopback is None else count_drops(self.loopback)

    # -------------------------------------------------------------------------------------- peers

    cdef int peers_set(self, int machine, Session session) except -1:
        Py_INCREF(session)
        self.peers[machine] = <PyObject*>session
        return 0

    cdef int peers_clear(self, Session session) except -1:
        if 0 <= session.peer < MAX_MACHINES and (
                self.peers[session.peer] is <PyObject*>session):
            self.peers[session.peer] = NULL
            Py_DECREF(session)
        return 0

    cdef int attach(self, Session session) except -1:
        # The handshake is complete: the session takes its place.
        cdef Session older
        session.when_full = self.full_peers.get(session.peer, self.full_default)
        if session.role == ROLE_GUEST:
            self.next_token += 1
            session.token = self.next_token
            self.guests[session.token] = session
        elif session.role == ROLE_UPLINK:
            self.uplink = session
            announce_to(self, session, SUBSCRIBED_ALL, local_channels(self))
        else:
            session.candidate = Candidate(session.peer)
            if self.breaker_failures:
                session.breaker = Breaker(self.breaker_failures)
            if self.peer_rate:
                session.limiter = Limiter(self.peer_rate, self.peer_size)
            session.limited = session.limiter is not None or self.limiter is not None
            if self.peers[session.peer] is not NULL:
                older = <Session><object>self.peers[session.peer]      # the slot may hold the last
                older.fail("replaced by a newer session")
            self.peers_set(session.peer, session)
            if session.lanes is not None:
                raise_lanes(session)
            if session.extended:
                greet(self, session)
        self.mesh.joined(session)
        if not session.extended:
            self.mesh.listed(session)
        return 0

    cdef int warn_of(self, Session session) except -1:
        # Strangers are not to fill the log.
        cdef uint64_t second = monotonic_ns() // 1000000000
        if second != self.second:
            if self.unsaid:
                log.warning("closed %d more sessions because of bad input", self.unsaid)
            self.second, self.said, self.unsaid = second, 0, 0
        if self.said == WARNINGS_A_SECOND:
            self.unsaid += 1
            return 0
        self.said += 1
        log.warning("closed the session with %s: %s", session.address, session.reason,
                    extra={"domi_address": session.address})
        return 0

    cdef int session_lost(self, Session session, bint was_up, bint protocol,
                          WriteQueue unsent) except -1:
        if protocol:
            self.count("protocol_errors")
            self.warn_of(session)
            if self.mesh is not None:
                self.mesh.refused(session, was_up)
        count_drops(session)
        if session.channels:
            drop_routes(self, session, set(session.channels))
        if session is self.loopback:
            # Before on_error runs, which may subscribe: a dead session gets into no route.
            self.loopback = None
            for channel in range(MAX_CHANNELS):
                route_remove(&self.channels[<int>channel].route, session)
        self.peers_clear(session)
        self.guests.pop(session.token, None)
        if self.uplink is session:
            self.uplink = None
            self.uplink_lost = session.reason
        self.frames_in += session.frames_in
        self.frames_out += session.frames_out
        self.bytes_in += session.bytes_in
        self.bytes_out += session.bytes_out
        if unsent.queued:
            # Not from within what ends it: a program's `on_error` may send, subscribe and close.
            self.engine.call_soon(self.tell_unsent, session, unsent)
        if was_up and session.main is None:     # a lane's have ended with those of the first
            fail_requests(self, session, True, False)
        if self.mesh is not None and session.role != ROLE_LOOPBACK:
            self.mesh.lost(session, was_up)
        return 0

    def tell_unsent(self, Session session, WriteQueue unsent):
        """What a session had not sent when it was lost, to who sent it."""
        while True:
            frame = unsent.take()
            if frame is None:
                break
            if session.role == ROLE_UPLINK:
                uplink_frame_lost(self, session, frame)
            elif frame.channel > USER_LAST:
                continue
            elif session.role == ROLE_GUEST:
                guest_frame_lost(self, frame)
            elif not is_request(frame.extend):
                self.report(errors.PeerLost(
                    f"node {session.peer} went before the frame was sent",
                    channel=frame.channel, peer=session.peer), frame)
