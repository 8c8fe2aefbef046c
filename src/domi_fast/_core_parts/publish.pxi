# One message to all who subscribe to its channel.
#
# The first publish of a turn goes past the queues of those who have nothing queued: what is written
# once is sent to each from where it is. The next ones of that turn are queued, as all else is, and
# go out together. So does the first where the turn before had several: they are as many system
# calls with it as without.
#
# Invariants: how much a session may queue, and what is done when that is full, is what it is for
# any message; nothing overtakes what is queued; who was left out is told of when the others have
# got it, for `on_error` may send, subscribe and close. Owned by the loop thread.

cdef enum:
    AT_ONCE = 2048              # bytes of the largest frame that goes past the queues
    AHEAD = 8                   # sessions: how far before its turn each is fetched from memory
    BESIDE_IT = 48              # bytes of a session's queue and driver that sending looks at


cdef int publish_to_all(Router router, int channel, bytes data) except -1:
    # The number of sessions that it was sent to, or queued for.
    cdef uint8_t frame[AT_ONCE]
    cdef size_t size = <size_t>PyBytes_GET_SIZE(data)
    cdef size_t length = HEADER + size + 1
    cdef bint encoded = length <= AT_ONCE and length <= router.frame_limit
    cdef bint first = router.engine.depth == 0 and not router.engine.burst
    cdef bint at_once = encoded and first and not router.engine.streaming
    cdef int sent = 0
    cdef list targets = members_of(&router.channels[channel].route)
    cdef list refusals = None
    cdef Session session
    cdef Session latest = None  # of those that it has gone to at once
    cdef Py_ssize_t i, count = len(targets)
    if router.engine.depth == 0:
        router.engine.published += 1
        if first and router.engine.streaming and count > 0:
            router.engine.end_soon()
    if encoded:
        write_header(frame, <uint32_t>length, 1, <uint16_t>channel)
        copy(frame + HEADER, PyBytes_AS_STRING(data), size)
        frame[HEADER + size] = TAG_PUBLISH
    if at_once:
        for i in range(min(<Py_ssize_t>AHEAD, count)):
            fetch_session(<Session><object>PyList_GET_ITEM(targets, i))
    for i in range(count):
        session = lane_of(<Session><object>PyList_GET_ITEM(targets, i), channel)
        if at_once and i + AHEAD < count:
            fetch_session(<Session><object>PyList_GET_ITEM(targets, i + AHEAD))
        if not encoded or not may_queue(session):
            if refusals is None:
                refusals = []
            sent += publish_to(router, session, channel, data, refusals)
            continue
        if at_once and may_pass_the_queue(session):
            send_at_once(session, frame, length)
            latest = session
        else:
            queue_encoded(session, frame, length)
        sent += 1
    if latest is not None:
        router.engine.end_soon()
        if router.engine.busy_ns:
            router.engine.poll_on(latest)
    if refusals is not None and not router.telling:
        for refusal in refusals:
            router.report(refusal, new_frame(channel, data, b""))
    return sent


cdef int publish_to(Router router, Session session, int channel, bytes data,
                    list refusals) except -1:
    # Whether it was queued. The session may be closed, and is once its policy has ended it.
    cdef uint8_t tag = TAG_PUBLISH
    cdef uint64_t frames = session.frames_out
    cdef uint16_t extend_size = 1 if session.extended else 0
    cdef int found = FRAME_FITS
    cdef object refused = None
    try:
        if session.queue.queued >= session.gate:
            # Asked before it would be raised: to raise costs more than the publish.
            found = room_for(session, channel, HEADER + <size_t>PyBytes_GET_SIZE(data)
                             + extend_size, False)
        if found == FRAME_FITS:
            session.put(channel, data, &tag, extend_size)
            return session.frames_out != frames     # or it was dropped
        if found == FRAME_REFUSED:
            refused = queue_is_full(session, channel)
    except (errors.Overloaded, errors.PeerLost) as error:
        refused = error
    if refused is not None:
        if session.state != SESSION_CLOSED and not has_room(session):
            drop(session, channel, 1)
        refusals.append(refused)
    return 0


cdef inline bint may_queue(Session session) noexcept:
    # Whether a frame may be queued without a closer look.
    return (session.state == SESSION_UP and session.queue.queued < session.gate
            and session.extended and not session.limited)


cdef inline int queue_encoded(Session session, const uint8_t* frame, size_t length) except -1:
    append_encoded(session.queue, frame, length)
    session.frames_out += 1
    if not session.dirty:
        session.engine.mark_dirty(session)
    elif session.queue.queued >= FLUSH_AT and session.driver is not None:
        session.flush()
    return 0


cdef inline bint may_pass_the_queue(Session session) noexcept:
    # Whether it may be sent past the queue: nothing is before it.
    return (session.queue.queued == 0 and not session.dirty
            and type(session.driver) is SocketDriver and not session.driver.writing)


cdef int send_at_once(Session session, const uint8_t* frame, size_t length) except -1:
    # What the kernel does not take is queued, as if it had been there from the beginning.
    cdef Py_ssize_t n = c_send(session.driver.fd, frame, length)
    cdef int failure = errno if n < 0 else 0
    session.frames_out += 1
    if n == <Py_ssize_t>length:
        session.bytes_out += length
        return 0
    try:
        append_encoded(session.queue, frame, length)
    except MemoryError:
        if n > 0:       # nothing can follow upon a part of a frame
            session.fail("no memory for the rest of a frame")
        raise
    if n > 0:
        session.bytes_out += n
        session.queue.consume(n)
    if failure == 0 or failure == EAGAIN:
        session.driver.want_write(session.on_writable)
    elif failure == EINTR:
        session.flush()
    else:
        session.send_failed(failure)
    return 0


cdef inline void fetch_session(Session session) noexcept:
    # What is looked at to send something, before it is wanted: of a thousand sessions it lies in no
    # cache any more.
    prefetch(<void*>session, <char*>(&session.extended + 1) - <char*><void*>session)
    prefetch(<void*>session.queue, BESIDE_IT)
    prefetch(<void*>session.driver, BESIDE_IT)
