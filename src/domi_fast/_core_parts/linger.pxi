# A connection that its session has given up, though its peer can still read what the sockets took.
#
# Invariants: nothing is sent on it, and what comes is thrown away, but it is read: who writes to a
# closed socket is told at once, and what it had not got yet is lost. It ends when the peer ends it,
# after `linger_time`, with the node, or when there are LINGERS_MOST others, those of guests first.
# Owned by the loop thread.

cdef int linger(Session session, bint closing=False) except -1:
    # Take the descriptor of a session that is about to fail; `closing`: for no longer than the node
    # takes to close, which may be in as many sessions as there are.
    cdef Linger last
    cdef Router router = session.router
    cdef int fd = session.driver.release()
    if c_shutdown(fd, SHUT_WR) < 0:
        c_close(fd)
        return 0
    last = Linger.__new__(Linger)
    last.router = router
    last.peer = session.peer
    last.info = session.info
    last.driver = SocketDriver(router.engine, fd)
    if len(router.lingering) >= LINGERS_MOST and not closing:
        router.count("lingers_cut_short")
        end_linger(first_to_end(router))
    router.lingering.append(last)
    try:
        last.timer = router.call_later(router.linger_time, last.end)
        last.driver.want_read(last.readable)
    except BaseException:
        end_linger(last)
        raise
    return 0


cdef Linger first_to_end(Router router):
    # Guests come and go as they like, and are not to take a node's place.
    cdef Linger oldest
    for oldest in router.lingering:
        if oldest.peer < 0:
            return oldest
    return <Linger>router.lingering[0]


cdef int end_linger(Linger linger) except -1:
    if linger.router is not None:
        linger.router.lingering.remove(linger)
        linger.router = None
        if linger.timer is not None:
            linger.timer.cancel()
            linger.timer = None
        linger.driver.close()
    return 0


@cython.final
cdef class Linger:
    # Belongs to its router, and to the loop by `readable`.

    def readable(self):
        # As far as it goes within reason: uvloop does not tell again of what stands before a reset.
        cdef uint8_t waste[16384]
        cdef Py_ssize_t n
        cdef int turn
        for turn in range(WASTES_A_TURN):
            if self.router is None:
                return
            n = self.driver.recv(waste, sizeof(waste))
            if n == -EAGAIN:
                return
            if n <= 0:
                end_linger(self)
                return
        self.driver.stop_read()
        self.router.engine.call_soon(self.read_on)

    def read_on(self):
        if self.router is not None:
            self.driver.want_read(self.readable)
            self.readable()

    def end(self):
        end_linger(self)
