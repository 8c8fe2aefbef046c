# The library's own channels: what the core does about heartbeats, pings, goodbyes, subscriptions
# and refusals. Owned by the loop thread.

cdef bint handle_library(Router router, Session session, RawFrame* frame) except -1:
    # Whether a handler on this channel may see the frame too.
    cdef uint16_t channel = frame.channel
    if ((CH_HEARTBEAT_REPLY <= channel <= CH_PONG and channel != CH_EXIT)
            or channel in (CH_SUBSCRIPTIONS, CH_STATE, CH_MEMORY)):
        session.beats_in += 1
    if channel == CH_HEARTBEAT:
        session.control(CH_HEARTBEAT_REPLY, b"")
    elif channel == CH_HEARTBEAT_REPLY:
        heard_answer(session)
    elif channel == CH_PONG:
        heard_pong(router, session)
    elif channel == CH_PING:
        session.control(CH_PONG, b"pong")
    elif channel == CH_EXIT:
        text = PyBytes_FromStringAndSize(<char*>frame.data, min(frame.size, <uint32_t>1024))
        end_connection(session, f"the peer said goodbye: {said_by_peer(text)}" if text
                       else "the peer said goodbye")
    elif channel == CH_NODE_NAME:
        session.fail("a second node name", True)
    elif not session.extended:
        router.count("dropped_not_negotiated")
    elif channel == CH_SUBSCRIPTIONS and session.main is not None:
        session.fail("subscriptions on a lane", True)
    elif channel == CH_SUBSCRIPTIONS:
        handle_subscriptions(router, session, frame)
    elif channel == CH_STATE:
        handle_state(router, session, frame)
    elif channel == CH_MEMORY:
        handle_memory(router, session, frame)
    elif channel == CH_REJECT:
        handle_reject(router, session, frame)
    elif channel == CH_RELAY and session.role == ROLE_GUEST:
        handle_relay(router, session, frame)
    elif router.channels[channel].handler is not NULL:
        return True
    else:
        router.count("dropped_not_negotiated")
        if frame.extend_size == REQUEST_EXTEND and frame.extend[0] == TAG_REQUEST:
            router.reject(session, STATUS_NO_SUBSCRIBER, frame)
    return False


cdef int handle_reject(Router router, Session session, RawFrame* frame) except -1:
    cdef uint16_t channel, extend_size
    if frame.extend_size != REJECT_EXTEND:
        return router.count("dropped_not_negotiated")
    channel = load16(frame.extend + 1)
    extend_size = load16(frame.extend + 3)
    if extend_size > frame.size:
        return router.count("dropped_not_negotiated")
    data = frame_data(frame)
    if session.role == ROLE_GUEST:
        return relay_reject(router, frame, data, extend_size)
    router.count("rejected")
    return router.report(
        failure(frame.extend[0], b"", channel, session.peer),
        Frame(channel, data[extend_size:], data[:extend_size]))
