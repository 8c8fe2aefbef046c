# Awaited requests: the slots by whose numbers answers find their askers, and how all of a session's
# end with it.
#
# Invariants: a slot's correlation is never used twice; a request stands in its slot until it ends,
# and holds a reference to itself there. Owned by the loop thread.

cdef double seconds_of(object timeout, int channel, int peer) except? -1.0:
    # Of a request, which are above zero.
    cdef double seconds = NAN
    try:
        if not isinstance(timeout, bool):
            seconds = timeout
    except TypeError:
        raise TypeError(f"timeout {timeout!r}: seconds, or None for no deadline, are "
                        "wanted") from None
    except OverflowError:
        pass        # an int that no double holds
    if seconds != seconds:
        raise ValueError(f"timeout {timeout!r:.100}: seconds, or None for no deadline, are wanted")
    if seconds <= 0.0:
        raise errors.DeadlineExceeded(
            f"the deadline of a request on channel {channel} has passed: timeout={seconds}",
            channel=channel, peer=peer if peer >= 0 else None, limit=seconds)
    return seconds


cdef Request open_request(Router router, Session session, uint16_t channel, object timeout):
    cdef Request request
    cdef double seconds
    cdef uint32_t slot
    cdef uint64_t delay
    if timeout is ...:
        seconds = router.timeout
    elif timeout is None:
        seconds = -1.0
    else:
        seconds = seconds_of(timeout, channel, session.peer)
    request = Request.__new__(Request)
    slot = take_slot(router, channel)
    request.engine = router.engine
    request.router = router
    request.session = session
    request.channel = channel
    request.correlation = (router.generations[slot] << SLOT_BITS) | slot
    request.deadline.node.kind = TIMER_REQUEST
    request.deadline.owner = <PyObject*>request
    request.timeout = seconds
    if session.candidate is not None:
        request.candidate = session.candidate
        request.candidate.outstanding += 1
        if router.measures:
            request.began = monotonic_ns()
    Py_INCREF(request)
    router.slots[slot] = <PyObject*>request
    if 0.0 <= seconds < INFINITY:
        seconds = min(seconds, 4e6)
        delay = <uint64_t>(seconds * 1e9)
        request.milliseconds = <uint32_t>((delay + 999999ULL) // 1000000ULL)
        router.engine.schedule(&request.deadline.node, delay)
    else:
        request.milliseconds = NO_DEADLINE
    return request


cdef uint32_t take_slot(Router router, int channel) except? 0xFFFFFFFF:
    cdef uint32_t count, i
    cdef void* memory
    if router.free_count == 0:
        if router.slot_count > <uint32_t>SLOT_MASK:
            router.count("refused_requests")
            raise errors.Overloaded(
                f"{router.slot_count} requests are in flight, as many as a node may have",
                channel=channel, limit=router.slot_count)
        count = max(<uint32_t>64, router.slot_count * 2)
        memory = realloc(router.slots, count * sizeof(PyObject*))
        if memory is NULL:
            raise MemoryError
        router.slots = <PyObject**>memory
        memory = realloc(router.generations, count * sizeof(uint64_t))
        if memory is NULL:
            raise MemoryError
        router.generations = <uint64_t*>memory
        memory = realloc(router.free_slots, count * sizeof(uint32_t))
        if memory is NULL:
            raise MemoryError
        router.free_slots = <uint32_t*>memory
        for i in range(count - router.slot_count):
            router.slots[router.slot_count + i] = NULL
            router.generations[router.slot_count + i] = 1
            router.free_slots[i] = count - 1 - i
        router.free_count = count - router.slot_count
        router.slot_count = count
    router.free_count -= 1
    return router.free_slots[router.free_count]


cdef int free_slot(Router router, uint32_t slot) except -1:
    cdef PyObject* request = router.slots[slot]
    router.slots[slot] = NULL
    router.generations[slot] += 1
    router.free_slots[router.free_count] = slot
    router.free_count += 1
    Py_XDECREF(request)
    return 0


cdef int handle_answer(Router router, Session session, RawFrame* frame) except -1:
    cdef uint64_t correlation
    cdef uint32_t slot
    cdef Request request
    cdef object value
    if frame.extend_size != ANSWER_EXTEND or not session.extended:
        return router.count("dropped_not_negotiated")
    correlation = load64(frame.extend)
    slot = <uint32_t>(correlation & SLOT_MASK)
    if slot >= router.slot_count or router.slots[slot] is NULL:
        return router.count("late_answers")
    request = <Request><object>router.slots[slot]
    if request.correlation != correlation or request.session is not session:
        return router.count("late_answers")
    value = frame_data(frame)
    if frame.extend[8] == STATUS_OK:
        return request.settle(REQUEST_DONE, value, router.engine.depth == 1)
    return request.settle(REQUEST_FAILED, failure(
        frame.extend[8], value, request.channel, session.peer), False)


cdef int fail_requests(Router router, Session session, bint whole, bint unsent) except -1:
    # The connection, or the `whole` session whose first it is, cannot answer any more what it was
    # sent, nor be answered; only `unsent`: what waits for room in its queue.
    cdef uint32_t slot
    cdef Request request
    cdef bint asked
    error = str(session.lost_error())
    for slot in range(router.slot_count):
        if router.slots[slot] is NULL:
            continue
        request = <Request><object>router.slots[slot]
        asked = request.session is session or (whole and main_of(request.session) is session)
        if asked and (request.waiting is not None or not unsent):
            request.settle(REQUEST_FAILED, errors.PeerLost(
                error, channel=request.channel, peer=session.peer), False)
        elif not unsent and request.origin is not None and (
                request.origin is session or (whole and main_of(request.origin) is session)):
            request.settle(REQUEST_CANCELLED, None, False)
    return 0
