# Lanes: the connections of one session, where it has more than one (docs/protocol.md, "Lanes").
#
# The first of them made the handshake and is the session that routes, tables and programs know: the
# *main* one. Each of the others is a Session too, with a socket, a queue and heartbeats of its own,
# and stands in no table. A message's channel says on which it travels, so that each channel keeps
# its order; what answers a request goes back on the one that brought it.
#
# Invariants: their number is agreed upon before the session is up, and stays; they come up together
# and fail together. What a lane brings is read once the main one has said who the peer is. When the
# peer ends one of them, nothing is sent any more and the others are read to their ends, so that
# what was sent before the end is had, as it is from a single connection; then the session is lost,
# and after `linger_time` at the latest. Owned by the loop thread.

cdef inline Session lane_of(Session session, int channel):
    # The connection of this session on which a message of the channel travels.
    return session if session.lanes is None else lane_among(session.lanes, channel)


cdef Session lane_among(list lanes, int channel):
    return <Session>lanes[channel % len(lanes)]


cdef inline Session main_of(Session session):
    return session if session.main is None else session.main


cdef inline bint is_parting(Session session) noexcept:
    # Whether the peer has ended one of its connections, after which nothing is sent on any.
    return (session.parting if session.main is None else session.main.parting) is not None


cdef list connections_of(Session session):
    return [session] if session.lanes is None else [
        lane for lane in session.lanes if lane is not None]


cdef bint misses_lanes(Session session) except -1:
    return session.lanes is not None and None in session.lanes


cdef int join_lane(Session main, Session lane, int index) except -1:
    # Both ends of the lane know by now that it is one; what it brings has to wait.
    if main.lanes is None or not 0 < index < len(main.lanes) or main.lanes[index] is not None:
        raise errors.FrameError(f"a lane {index}, which nobody waits for")
    lane.main = main
    lane.peer = main.peer
    lane.info = main.info
    lane.extended = True
    lane.state = SESSION_LANE
    lane.reader.limit = lane.router.frame_limit
    main.lanes[index] = lane
    return lane.hold_reading()


cdef int raise_lanes(Session main) except -1:
    # The handshake of the main is complete, and with it that of its lanes.
    cdef Session lane
    for lane in main.lanes[1:]:
        lane.state = SESSION_UP
        lane.guard = None
        lane.engine.wheel.remove(&lane.heartbeat.node)
        lane.candidate = main.candidate
        lane.breaker = main.breaker
        lane.limiter = main.limiter
        lane.limited = main.limited
        lane.when_full = main.when_full
        begin_beats(lane)
        main.router.mesh.joined(lane)
    return 0


cdef int read_lanes(Session main) except -1:
    # The peer is known: what its lanes have brought meanwhile is read from now on.
    cdef Session lane
    if main.lanes is not None:
        for lane in main.lanes[1:]:
            lane.go_on_reading()
    return 0


cdef int end_connection(Session session, str reason) except -1:
    # The peer has ended this connection: what it sent before was read.
    cdef Session main = main_of(session)
    cdef Session lane
    if main.lanes is None or main.state != SESSION_UP or not main.announced:
        return main.fail(reason)
    session.parted = True
    session.engine.wheel.remove(&session.heartbeat.node)
    session.read_no_more()
    if main.parting is None:
        begin_parting(main, reason)
    # What was asked on this connection cannot be answered any more.
    fail_requests(main.router, session, False, False)
    for lane in connections_of(main):
        if not lane.parted:
            return 0
    return main.fail(main.parting)


cdef int begin_parting(Session main, str reason) except -1:
    # Nothing is written any more, not even a goodbye: for whoever has closed a connection and still
    # has something to send on it, a byte that comes is a reason to throw that away. That nothing
    # follows is said without one, and is what a peer that lives ends its own side for.
    cdef Session lane
    main.parting = reason
    main.parting_timer = main.router.call_later(main.router.linger_time, main.part)
    reroute(main.router, main)
    for lane in connections_of(main):
        lane.gate = 0           # who sends all the same is told that the peer is gone
        lane.unheard = 0
        lane.driver.half_close()
    fail_requests(main.router, main, True, True)
    for lane in connections_of(main):
        if lane.room_waiters:
            lane.wake_drained()
    return 0


cdef bint is_too_late(Session session) except -1:
    # For an answer: who asked is going, and it is counted.
    if not is_parting(session):
        return False
    if session.router is not None:
        session.router.count("answers_lost")
    return True


cdef int fail_lanes(list lanes, int index, object reason) except -1:
    # Those from `index` on, of a session that has failed; also where on_error ends the loop.
    cdef Session lane
    if index == len(lanes):
        return 0
    lane = lanes[index]
    try:
        if lane is not None:
            lane.fail(reason)
    finally:
        fail_lanes(lanes, index + 1, reason)
    return 0


async def drained_lanes(lanes):
    """Wait until there is room in each of the lanes."""
    for lane in lanes:
        await lane.drained()
