# What waits for a receiver that is slower than its senders: how much may, and what is done when it
# is as much as may.
#
# Invariants: what all sessions have been granted beyond ROOM_LEAST of each, and what their requests
# that wait for room have, is at most what the node may queue; only whole frames that ask for no
# answer, of users' channels whose policy it is, are ever dropped, and each is counted; while a
# request waits for room nothing is queued before it. Nothing here runs a program's code, but for
# the end of a session. Owned by the loop thread.

cdef dict FULL_NAMES = {"raise": FULL_RAISE, "drop_oldest": FULL_DROP_OLDEST,
                        "drop_newest": FULL_DROP_NEWEST, "disconnect": FULL_DISCONNECT}


cdef int full_policy(object name) except -1:
    cdef object found = FULL_NAMES.get(name) if isinstance(name, str) else None
    if found is None:
        raise ValueError(
            f"when_full {name!r}: one of {', '.join(map(repr, FULL_NAMES))} is wanted")
    return found


# -------------------------------------------------------------------------------------------- room

cdef size_t room_at_least(Router router) noexcept:
    # Bytes that a session may queue whatever the others do.
    return min(<size_t>ROOM_LEAST, router.queue_limit)


cdef void set_room(Session session, size_t room) noexcept:
    session.room = room
    open_gate(session)


cdef void open_gate(Session session) noexcept:
    # Unless a request waits, or the peer has ended one of its connections.
    session.gate = session.room if session.waiting is None and not is_parting(session) else 0


cdef bint has_room(Session session) noexcept:
    # Whether a frame may be queued now.
    return session.queue.queued < session.room or more_room(session) > 0


cdef size_t more_room(Session session) noexcept:
    # Bytes by which the session's room may grow now.
    cdef Router router = session.router
    if router.granted >= router.node_queue_limit:
        return 0            # what waits may be one request more, of each session
    return min(<size_t>ROOM_STEP, min(router.queue_limit - session.room,
                                      router.node_queue_limit - router.granted))


cdef bint grow_room(Session session) noexcept:
    # Whether there is room, after the session has been granted more, if need be and it can be.
    cdef size_t more
    while session.queue.queued >= session.room:
        more = more_room(session)
        if more == 0:
            return False
        session.router.granted += more
        set_room(session, session.room + more)
    return True


cdef bint has_room_on_top(Session session) noexcept:
    # For what the library has to say whatever waits: a quarter more.
    return grow_room(session) or session.queue.queued < session.room + session.room // 4


cdef int shrink_room(Session session, size_t room) except -1:
    # Give back what the session has been granted beyond that.
    room = max(room_at_least(session.router), room)
    if room < session.room:
        session.router.granted -= session.room - room
        set_room(session, room)
        wake_short(session.router)
    return 0


cdef int wake_short(Router router) except -1:
    # The node has room again, for those who are short of it.
    cdef list short
    cdef Session session
    if router.short_of_room:
        short, router.short_of_room = router.short_of_room, []
        for session in short:
            if session.state != SESSION_CLOSED:
                session.wake_drained()
    return 0


cdef int note_shortage(Session session) except -1:
    # If it is the node that has no room: who gives some back wakes this session.
    cdef Router router = session.router
    if (session.room < router.queue_limit and more_room(session) == 0
            and session not in router.short_of_room):
        router.short_of_room.append(session)
    return 0


# ---------------------------------------------------------------------------------- when it is full

cdef bint asks_for_answer(const uint8_t* extend, uint16_t extend_size, int prefix) noexcept:
    # `prefix`: bytes that stand before the extend of what goes to a guest.
    return extend_size == prefix + REQUEST_EXTEND and extend[prefix] == TAG_REQUEST


cdef int drop(Session session, int channel, uint64_t count) except -1:
    # Count what was dropped, by whom it was for and by channel.
    if session.drop_channel != channel:
        count_drops(session)
        session.drop_channel = channel
    session.dropped += count
    return note_slow(session)


cdef int count_drops(Session session) except -1:
    # What drop() has added up since the last time, of one channel, gets into the counters.
    cdef Router router = session.router
    cdef uint64_t count = session.dropped
    cdef tuple key
    if count == 0:
        return 0
    session.dropped = 0
    key = (session.peer, session.drop_channel)
    if key not in router.drop_counts and len(router.drop_counts) >= DROP_COUNTS:
        key = (-1, -1)      # channels without end get no counters without end
    router.drop_counts[key] = router.drop_counts.get(key, 0) + count
    return router.count("dropped_slow_peer", count)


cdef int note_slow(Session session) except -1:
    # That its queue is full is told once in a while, and not from within what is going on.
    cdef uint64_t now
    if session.slow or session.state == SESSION_CLOSED:
        return 0
    session.slow = True
    now = monotonic_ns()
    if session.slow_told == 0 or now - session.slow_told > SLOW_EVERY:
        session.slow_told = now
        session.engine.call_soon(session.tell_slow, session.queue.queued)
    return 0


cdef int policy_when_full(Session session, uint16_t channel) except -1:
    cdef Router router = session.router
    if router.full_channels and channel in router.full_channels:
        return router.full_channels[channel]
    return session.when_full


cdef int make_room(Session session, uint16_t channel, size_t length, bint asks) except -1:
    # Of a queue that is full, for a frame of this length that `asks` for an answer or does not: 1,
    # there is room now; 0, the frame is dropped, and counted. Raises what forbids to send it.
    cdef int found = room_for(session, channel, length, asks)
    if found == FRAME_REFUSED:
        raise queue_is_full(session, channel)
    return found == FRAME_FITS


cdef int room_for(Session session, uint16_t channel, size_t length, bint asks) except -1:
    # make_room(), where it is for the caller to say that the queue is full: FRAME_REFUSED, counted.
    cdef int policy
    cdef bint of_node
    cdef Router router = session.router
    if session.state == SESSION_CLOSED or is_parting(session):
        raise session.lost_error()
    if length > router.frame_limit:
        raise frame_too_large(router, channel, length)
    # What the library says, and what answers, passes the requests that wait.
    if (session.waiting is None or (channel > USER_LAST and channel != CH_RELAY)) and (
            grow_room(session)):
        return FRAME_FITS
    of_node = session.room < router.queue_limit
    if channel <= USER_LAST:
        policy = policy_when_full(session, channel)
    elif channel == CH_ANSWER and session.when_full == FULL_DROP_OLDEST:
        policy, asks = FULL_DROP_OLDEST, True       # it takes the place of others, or is refused
    else:
        policy = FULL_RAISE
    if policy == FULL_DROP_OLDEST and drop_oldest(session, length):
        return FRAME_FITS
    if (policy == FULL_DISCONNECT and session.role != ROLE_LOOPBACK and not of_node
            and session.queue.queued >= session.room):
        disconnect(session, channel, asks)
    if asks or policy == FULL_RAISE or policy == FULL_DISCONNECT:
        router.refused += 1
        note_slow(session)
        return FRAME_REFUSED
    drop(session, channel, 1)
    return FRAME_DROPPED


cdef object queue_is_full(Session session, uint16_t channel):
    # Why a frame was refused. Of who is stopped each publish is, and finds the queue as it was: the
    # text is made once for all of them.
    cdef Router router = session.router
    cdef size_t queued = session.queue.queued
    cdef bint of_node = session.room < router.queue_limit
    if session.full_text is None or session.full_queued != queued or session.full_node != of_node:
        session.full_advice = advice_of(session)
        session.full_text = (
            f"{queued} bytes wait for node {session.peer}, as many as "
            f"{'the node' if of_node else 'a session'} may queue{session.full_advice}",)
        session.full_queued = queued
        session.full_node = of_node
    return overloaded_as(session, channel,
                         router.node_queue_limit if of_node else router.queue_limit,
                         session.full_text, session.full_advice)


cdef bint drop_oldest(Session session, size_t length) except -1:
    # Whether that has made room for so many bytes; of a frame that is larger than the limit, for
    # its beginning. Some more is dropped than need be, so that it need not be for each frame.
    cdef size_t room = session.room
    cdef size_t wanted = session.queue.queued + min(length, room) - room
    cdef dict dropped
    if session.waiting is not None:
        return False        # for what has come before
    dropped = session.queue.drop_oldest(
        wanted + room // 64, 2 if session.role == ROLE_GUEST else 0,
        session.router.full_channels, session.when_full)
    for channel, count in dropped.items():
        drop(session, channel, count)
    return session.queue.queued < room


cdef int disconnect(Session session, uint16_t channel, bint asks) except -1:
    # The session ends; what waited in it is counted, and reported as what any lost peer missed. The
    # peer may still read what the sockets have taken.
    cdef int prefix = 2 if session.role == ROLE_GUEST else 0
    cdef size_t queued = session.queue.queued
    cdef list connections = connections_of(main_of(session))
    cdef Session connection
    if not asks:
        drop(session, channel, 1)
    for connection in connections:
        for found, count in connection.queue.droppable(prefix).items():
            drop(connection, found, count)
    try:
        for connection in connections:
            linger(connection)
    finally:
        session.fail(f"it is slow: {queued} bytes wait for it (when_full='disconnect')")
    raise session.lost_error()


# ------------------------------------------------------------------------ requests that wait for it

@cython.final
cdef class Waiting:
    # A request that there was no room for: it goes out, in its turn, when there is.
    pass


cdef bint request_has_room(Session session, int channel) except -1:
    # Whether a request need not wait: its queue is full, or another waits.
    cdef int policy
    if session.state == SESSION_CLOSED or is_parting(session):
        return True         # to hear of it
    if session.waiting is not None:
        return False
    if grow_room(session):
        return True
    policy = policy_when_full(session, <uint16_t>channel)
    if policy == FULL_DISCONNECT:
        return session.room == session.router.queue_limit
    return policy == FULL_DROP_OLDEST and drop_oldest(session, HEADER + REQUEST_EXTEND)


cdef int await_room(Router router, Session session, Request request, int channel, object data,
                    object to) except -1:
    cdef Waiting waiting
    cdef size_t size
    cdef bint of_session
    if not PyBytes_CheckExact(data):
        data = bytes_of(data)       # its owner may change it meanwhile
    size = (HEADER + <size_t>PyBytes_GET_SIZE(data)
            + (RELAY_EXTEND if session is router.uplink else REQUEST_EXTEND))
    if size > router.frame_limit:
        raise frame_too_large(router, channel, size)
    if may_wait_no_more(session, size):
        router.refused += 1
        note_slow(session)
        of_session = session.waiting_bytes >= router.queue_limit
        raise overloaded(
            session, channel, router.queue_limit if of_session else router.node_queue_limit,
            f"{session.waiting_bytes} bytes of requests wait for room in the queue for node "
            f"{session.peer}, as many as {'may' if of_session else 'the node has room for'}")
    waiting = Waiting.__new__(Waiting)
    waiting.request = request
    waiting.channel = channel
    waiting.data = data
    waiting.to = to
    waiting.since = monotonic_ns()
    waiting.size = size
    request.waiting = waiting
    if session.waiting is None:
        session.waiting = deque()
    session.waiting.append(waiting)
    session.waiting_bytes += size
    router.granted += size
    session.gate = 0
    session.draining = True
    return note_shortage(session)


cdef bint may_wait_no_more(Session session, size_t size) noexcept:
    # One more than the limit, as in the queue itself; of the node's, not.
    cdef Router router = session.router
    return (session.waiting_bytes >= router.queue_limit
            or (session.waiting is not None
                and router.granted + size > router.node_queue_limit))


cdef int forget_waiting(Session session, Waiting waiting) noexcept:
    # It is sent, or never will be: its bytes are nobody's.
    session.waiting_bytes -= waiting.size
    session.router.granted -= waiting.size
    waiting.request.waiting = None
    waiting.request = None
    waiting.data = None
    return 0


cdef int stop_waiting(Session session, Waiting waiting) except -1:
    # The request has ended. Its place in the queue goes with the others' that have, all at once.
    forget_waiting(session, waiting)
    session.ended_waiting += 1
    if 2 * session.ended_waiting > <Py_ssize_t>len(session.waiting) + 64:
        forget_ended(session)
    if session.waiting is None:
        session.wake_drained()
    return wake_short(session.router)


cdef int end_waiting(Session session) noexcept:
    # None waits any more.
    session.waiting = None
    session.ended_waiting = 0
    open_gate(session)
    return 0


cdef int forget_ended(Session session) except -1:
    # The places of requests that have ended without having been sent.
    cdef Waiting waiting
    session.waiting = deque([waiting for waiting in session.waiting if waiting.request is not None])
    session.ended_waiting = 0
    return 0 if session.waiting else end_waiting(session)


cdef int forget_all(Session session) except -1:
    # The session is over: the requests end as all that are in flight.
    cdef Waiting waiting
    if session.waiting is not None:
        for waiting in session.waiting:
            if waiting.request is not None:
                forget_waiting(session, waiting)
        end_waiting(session)
    if session in session.router.short_of_room:
        session.router.short_of_room.remove(session)
    return wake_short(session.router)


cdef int send_waiting(Session session) except -1:
    # As many of the requests that wait as there is room for, and the limits let pass.
    cdef Waiting waiting
    cdef Request request
    cdef bytes data
    cdef uint64_t milliseconds
    while session.waiting is not None and not is_parting(session):
        if not session.waiting:
            return end_waiting(session)
        waiting = session.waiting[0]
        request = waiting.request
        if request is None:
            session.waiting.popleft()
            session.ended_waiting -= 1
            continue
        if not grow_room(session) or (session.limited and seconds_to_wait(session) > 0.0):
            return 0
        session.waiting.popleft()
        data = waiting.data
        forget_waiting(session, waiting)
        if request.milliseconds != NO_DEADLINE:
            milliseconds = (monotonic_ns() - waiting.since) // 1000000ULL
            request.milliseconds = <uint32_t>max(
                <int64_t>1, <int64_t>request.milliseconds - <int64_t>milliseconds)
        session.gate = session.room
        try:
            put_request(session.router, session, request, waiting.channel, data, waiting.to)
        except errors.DomiError as error:
            request.settle(REQUEST_FAILED, error, False)
        if session.state == SESSION_CLOSED:
            return 0
        session.gate = 0
    return 0


cdef int put_request(Router router, Session session, Request request, int channel, object data,
                     object to) except -1:
    cdef uint8_t extend[REQUEST_EXTEND]
    if session is router.uplink:
        return uplink_send(router, VERB_REQUEST, channel, data, 0, to, request.correlation,
                           request.milliseconds, None)
    extend[0] = TAG_REQUEST
    store64(extend + 1, request.correlation)
    store32(extend + 9, request.milliseconds)
    return session.put(<uint16_t>channel, data, extend, REQUEST_EXTEND)
