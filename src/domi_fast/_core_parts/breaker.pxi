# When a peer is not to be sent to for now: its circuit breaker, and the limits of bytes a second.
#
# Invariants: a session whose circuit is not closed stands in no route; a probe's timer runs while
# the circuit is not closed and the session lives. A bucket that was overdrawn lets nothing pass
# until it has filled up again, so that a frame may be larger than the bucket and the rate is kept
# all the same. Owned by the loop thread.

cdef enum:
    CIRCUIT_CLOSED = 0
    CIRCUIT_OPEN = 1
    CIRCUIT_HALF_OPEN = 2       # a ping is on its way

CIRCUITS = {CIRCUIT_CLOSED: "closed", CIRCUIT_OPEN: "open", CIRCUIT_HALF_OPEN: "half-open"}


@cython.final
cdef class Breaker:
    # Of one session: when its latest failures were, as many as open it.

    def __cinit__(self, Py_ssize_t most):
        self.most = most

    def __dealloc__(self):
        free(self.times)

    cdef bint fails(self, uint64_t now, uint64_t window) except -1:
        # Note a failure: whether there were as many as open the circuit within the window.
        cdef uint64_t oldest
        if self.times is NULL:
            self.times = <uint64_t*>calloc(self.most, sizeof(uint64_t))
            if self.times is NULL:
                raise MemoryError
        self.times[self.at] = now
        self.at = (self.at + 1) % self.most
        self.count += 1
        oldest = self.times[self.at]
        return self.count >= <uint64_t>self.most and now - oldest <= window

    cdef int forget(self) except -1:
        self.count = 0
        return 0


cdef int request_failed(Router router, Session session) except -1:
    # A request got no answer in time.
    cdef Breaker breaker = session.breaker
    session = main_of(session)
    if breaker is None or breaker.state != CIRCUIT_CLOSED or session.state != SESSION_UP:
        return 0
    if breaker.fails(monotonic_ns(), router.breaker_window):
        breaker.state = CIRCUIT_OPEN
        router.count("circuits_opened")
        log.warning("node %d: %d requests got no answer within %g s: its circuit is open",
                    session.peer, breaker.most, <double>router.breaker_window * 1e-9,
                    extra={"domi_peer": session.peer})
        reroute(router, session)
        breaker.timer = router.call_later(<double>router.breaker_pause * 1e-9, session.probe)
    return 0


cdef int probe_peer(Router router, Session session) except -1:
    # Ask whether it is there, again and again; its pong closes the circuit.
    cdef Breaker breaker = session.breaker
    if session.state != SESSION_UP:
        return 0
    breaker.state = CIRCUIT_HALF_OPEN
    session.control(CH_PING, b"ping")
    session.flush()
    breaker.timer = router.call_later(<double>router.breaker_pause * 1e-9, session.probe)
    return 0


cdef int heard_pong(Router router, Session session) except -1:
    cdef Breaker breaker = session.breaker
    if breaker is None or breaker.state != CIRCUIT_HALF_OPEN:
        return 0
    breaker.state = CIRCUIT_CLOSED
    breaker.forget()
    breaker.timer.cancel()
    breaker.timer = None
    router.count("circuits_closed")
    log.info("node %d has answered: its circuit is closed", session.peer,
             extra={"domi_peer": session.peer})
    return reroute(router, main_of(session))


cdef object circuit_open(int channel, Session session):
    return errors.CircuitOpen(
        f"node {session.peer} has left too many requests without an answer, and is left alone "
        "until it answers a ping", channel=channel, peer=session.peer)


# ------------------------------------------------------------------------------------------- limits

@cython.final
cdef class Limiter:
    """A token bucket: so many bytes a second, and so many at once.

    :param rate: bytes a second that it gains.
    :param size: bytes that it holds.
    """

    def __cinit__(self, double rate, double size):
        self.rate = rate * 1e-9
        self.size = self.tokens = size
        self.filled = monotonic_ns()

    cdef int fill(self) except -1:
        cdef uint64_t now = monotonic_ns()
        self.tokens = min(self.size, self.tokens + <double>(now - self.filled) * self.rate)
        self.filled = now
        return 0

    cdef double wait(self) except -1.0:
        # Seconds until something may pass.
        self.fill()
        return 0.0 if self.tokens > 0.0 else (1.0 - self.tokens) / self.rate * 1e-9


cdef inline bint is_overdrawn(Limiter limiter) noexcept:
    return limiter is not None and limiter.tokens <= 0.0


cdef int fill_limiters(Session session) except -1:
    if session.limiter is not None:
        session.limiter.fill()
    if session.router.limiter is not None:
        session.router.limiter.fill()
    return 0


cdef inline bint let_pass(Session session, size_t length) except -1:
    # Whether the limits let a frame pass; if they do, it is paid for. The clock is asked for the
    # first frame of those that are flushed together, and before anything is refused.
    cdef Limiter own = session.limiter
    cdef Limiter shared = session.router.limiter
    if not session.dirty or is_overdrawn(own) or is_overdrawn(shared):
        fill_limiters(session)
        if is_overdrawn(own) or is_overdrawn(shared):
            return False
    if own is not None:
        own.tokens -= <double>length
    if shared is not None:
        shared.tokens -= <double>length
    return True


cdef double seconds_to_wait(Session session) except -1.0:
    cdef double longest = 0.0
    for limiter in (session.limiter, session.router.limiter):
        if limiter is not None:
            longest = max(longest, (<Limiter>limiter).wait())
    return longest


cdef int refuse_for_rate(Session session, uint16_t channel) except -1:
    cdef Limiter limiter = session.limiter
    if limiter is None or limiter.tokens > 0.0:
        limiter = session.router.limiter
    session.router.count("refused_rate")
    raise overloaded(
        session, channel, limiter.rate * 1e9,
        f"{limiter.rate * 1e9:g} bytes a second are allowed "
        f"{'to node %d' % session.peer if limiter is session.limiter else 'for this node'}, "
        "and as many were sent")
