# Heartbeats, and who is declared lost for its silence.
#
# Every byte is a sign of life. How long a silence may be is `silence_ns` of the router; with a
# threshold for phi it is what the rhythm of the peer's answers to our heartbeats makes of it, and
# at most that. Phi is the accrual detector's (N. Hayashibara et al., "The phi accrual failure
# detector", SRDS 2004): -log10 of the chance that a silence as long as this one ends by itself, if
# the intervals between the answers are normally distributed. Their mean and variance are weighted
# by age, which needs no window.
#
# A session whose reading is held is no exception, for the kernel knows when something has come: the
# detector goes by that, and not by what has been read. Owned by the loop thread.

cdef double deviations(double phi) noexcept:
    # Standard deviations above the mean that a silence of this phi is long.
    cdef double low = -40.0, high = 40.0, middle
    cdef int i
    for i in range(64):
        middle = 0.5 * (low + high)
        if phi_at(middle) < phi:
            low = middle
        else:
            high = middle
    return high


cdef double phi_at(double deviations) noexcept:
    return -log10(0.5 * erfc(deviations * M_SQRT1_2))


cdef double spread(Session session) noexcept:
    # The standard deviation; a peer that was regular so far may be late all the same.
    return max(sqrt(session.interval_variance), session.interval_mean * LEAST_SPREAD)


cdef int begin_beats(Session session) except -1:
    # The handshake is complete. Until the rhythm is known it is taken for ours.
    cdef Router router = session.router
    session.last_heard = session.engine.now
    session.last_answer = 0
    session.asked = False
    session.beat_due = session.engine.now + router.heartbeat_ns
    session.interval_mean = router.heartbeat_ns * 1e-9
    session.interval_variance = 0.0
    return schedule_beat(session, session.engine.now)


cdef int heard_answer(Session session) noexcept:
    # The peer has answered a heartbeat; the first answer says nothing of an interval.
    cdef uint64_t now = session.engine.now
    cdef uint64_t before = session.last_answer
    cdef double late
    if not session.asked:
        return 0
    session.asked = False
    session.last_answer = now
    if before == 0:
        return 0
    late = (now - before) * 1e-9 - session.interval_mean
    session.interval_mean += late * NEWEST_WEIGHT
    session.interval_variance = (1.0 - NEWEST_WEIGHT) * (
        session.interval_variance + late * late * NEWEST_WEIGHT)
    return 0


cdef uint64_t patience(Session session) noexcept:
    # Nanoseconds of silence after which the peer is lost.
    cdef Router router = session.router
    if router.phi_deviations == INFINITY or session.last_answer == 0:
        return router.silence_ns
    return min(router.silence_ns, <uint64_t>(1e9 * (
        session.interval_mean + router.phi_deviations * spread(session))))


cdef int schedule_beat(Session session, uint64_t now) except -1:
    cdef uint64_t when = min(session.beat_due, session.last_heard + patience(session))
    session.engine.schedule(&session.heartbeat.node, when - now if when > now else 1000000)
    return 0


cdef int hear_unread(Session session, uint64_t now) noexcept:
    # Of a session that is up, and held.
    cdef uint64_t silent = unread_silence(session.driver.fd, &session.driver.unread)
    if silent < now:
        session.last_heard = max(session.last_heard, now - silent)
    return 0


cdef int beat(Session session) except -1:
    # The session's timer, in a batch.
    cdef uint64_t now = monotonic_ns()
    if session.state == SESSION_CLOSED:
        return 0
    if session.state != SESSION_UP:
        return session.engine.end_later(session)
    if session.holding:
        hear_unread(session, now)
    if now - session.last_heard >= patience(session):
        # Perhaps it was this process that stood still: look before judging.
        if not session.continuing:
            session.engine.schedule(&session.heartbeat.node, 1000000)   # should a handler raise
            session.read_some()
            session.engine.wheel.remove(&session.heartbeat.node)
        if session.state == SESSION_CLOSED or session.parted:
            return 0
        now = max(now, session.last_heard)
        if session.continuing and not session.holding:
            # There is more to read; what it is will be known then.
            say_beat(session, now)
            session.engine.schedule(&session.heartbeat.node, 1000000)
            return 0
        if now >= session.beat_due + session.router.heartbeat_ns // 2:
            # It was: the peer has not been asked for as long.
            session.last_heard = now
        if now - session.last_heard >= patience(session):
            session.router.count("peers_silent")
            session.fail(f"silent for {(now - session.last_heard) * 1e-9:.1f} s")
            return 0
    say_beat(session, now)
    return schedule_beat(session, now)


cdef int say_beat(Session session, uint64_t now) except -1:
    if now >= session.beat_due:
        session.beat_due = now + session.router.heartbeat_ns
        session.asked = True
        session.control(CH_HEARTBEAT, b"")
    return 0
