# Guests: clients without a machine id, whose node sends, routes and answers for them.
#
# A guest sends its verbs as RELAY frames; its node gives it the messages of the channels that it
# subscribes to, with the sender's machine id in front of the extend. A request that crosses a node
# on its way to or from a guest gets a correlation of its own there. Owned by the loop thread.

cdef int uplink_send(Router router, uint8_t verb, int channel, object data, int reply_channel,
                     object to, uint64_t correlation, uint32_t milliseconds,
                     bytes stages) except -1:
    # The guest's side: a verb for the node to carry out.
    cdef bytes extend = PyBytes_FromStringAndSize(
        NULL, RELAY_EXTEND + (0 if stages is None else len(stages)))
    cdef uint8_t* p = <uint8_t*>PyBytes_AS_STRING(extend)
    cdef int machine = NO_MACHINE
    if len(extend) > 0xFFFF:
        raise errors.FrameError("a pipeline with more stages than a guest can pass on",
                                channel=channel, limit=0xFFFF)
    router.require_engine()
    if to is not None:
        machine = machine_of(to)
        if machine == MAX_MACHINES:
            raise errors.PeerLost(f"no node {to}: machine ids are 0-1023", channel=channel)
    p[0] = verb
    store16(p + 1, <uint16_t>channel)
    store16(p + 3, <uint16_t>machine)
    store16(p + 5, <uint16_t>reply_channel)
    store64(p + 7, correlation)
    store32(p + 15, milliseconds)
    if stages is not None:
        copy(p + RELAY_EXTEND, PyBytes_AS_STRING(stages), len(stages))
    router.uplink.put(CH_RELAY, data, p, <uint16_t>len(extend))
    return 0


cdef int handle_relay(Router router, Session guest, RawFrame* frame) except -1:
    # The node's side: carry out what the guest asks for.
    if frame.extend_size < RELAY_EXTEND:
        guest.fail("a malformed relay", True)
        return 0
    data = frame_data(frame)
    try:
        relay_verb(router, guest, frame.extend, frame.extend_size, data)
    except errors.DomiError as error:
        refuse_relay(router, guest, frame, data, error)
    except BaseException as error:
        # Of a policy of the program's.
        router.count("relay_errors")
        refuse_relay(router, guest, frame, data, error)
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        log.error("a guest's message on channel %d could not be sent on",
                  load16(frame.extend + 1), exc_info=error)
    return 0


cdef int refuse_relay(Router router, Session guest, RawFrame* frame, bytes data,
                      object error) except -1:
    # Tell the guest why its message was not sent on.
    cdef const uint8_t* p = frame.extend
    cdef uint8_t out[REJECT_EXTEND]
    cdef uint8_t answer[ANSWER_EXTEND]
    status, text = status_of(error)
    try:
        if p[0] == VERB_REQUEST:
            copy(answer, p + 7, 8)
            answer[8] = status
            guest.put_failure(CH_ANSWER, text, answer, ANSWER_EXTEND)
        else:
            refused = relayed_extend(p, frame.extend_size, router.id)
            out[0] = status
            store16(out + 1, load16(p + 1))
            store16(out + 3, <uint16_t>len(refused))
            guest.put(CH_REJECT, refused + data, out, REJECT_EXTEND)
    except (errors.Overloaded, errors.FrameError, errors.PeerLost):
        router.count("rejects_lost")
    return 0


cdef int relayed_channel(int channel) except -1:
    # What a guest names is checked at the guest too; one built by hand may name anything.
    try:
        return check_channel(channel)
    except ValueError as error:
        raise errors.DomiError(str(error), channel=channel) from None


cdef int relay_verb(Router router, Session guest, const uint8_t* p, uint16_t size,
                    object data) except -1:
    cdef uint8_t verb = p[0]
    cdef int channel = load16(p + 1)
    cdef int machine = load16(p + 3)
    cdef int reply_channel = load16(p + 5)
    cdef uint64_t correlation = load64(p + 7)
    cdef uint32_t milliseconds = load32(p + 15)
    cdef uint8_t extend[REQUEST_EXTEND]
    cdef Session session
    cdef Request request
    to = None if machine == NO_MACHINE else machine
    if (router.state != STATE_SERVING and verb != VERB_REPLY and to is None
            and router.channels[channel].route is NULL):
        raise no_subscriber(router, channel)
    if verb == VERB_NOTIFY:
        router.send_notify(relayed_channel(channel), data, to, True)
    elif verb == VERB_PUBLISH:
        router.send_publish(relayed_channel(channel), data, to)
    elif verb == VERB_PIPELINE:
        relayed_channel(channel)
        router.send_stage(channel, data, p + RELAY_EXTEND, size - RELAY_EXTEND)
    elif verb == VERB_CALL:
        relayed_channel(reply_channel)
        session = lane_of(pick(router, relayed_channel(channel), to, True), channel)
        if not session.extended:
            raise errors.DomiError(
                f"node {session.peer} speaks the plain protocol, which cannot answer a guest",
                channel=channel, peer=session.peer)
        extend[0] = TAG_GUEST_CALL
        store16(extend + 1, <uint16_t>router.id)
        store16(extend + 3, <uint16_t>reply_channel)
        store32(extend + 5, guest.token)
        session.put(channel, data, extend, GUEST_CALL_EXTEND)
    elif verb == VERB_REQUEST:
        session = lane_of(pick(router, relayed_channel(channel), to, True), channel)
        if not session.extended:
            raise errors.DomiError(
                f"node {session.peer} speaks the plain protocol, which has no requests",
                channel=channel, peer=session.peer)
        relay_request(router, session, guest, channel, data, correlation, milliseconds)
    elif verb == VERB_REPLY:
        if not USER_FIRST <= channel <= USER_LAST:
            raise errors.DomiError(f"channel {channel}: users have 50-65499", channel=channel)
        session = lane_of(router.session_to(machine), channel)
        if correlation:
            # The reply is for another guest: its number stands in the low half.
            extend[0] = TAG_GUEST_REPLY
            store32(extend + 1, <uint32_t>correlation)
            session.put(channel, data, extend, GUEST_REPLY_EXTEND)
        else:
            session.put(channel, data, NULL, 0)
    else:
        raise errors.DomiError(f"verb {verb} is not known", channel=channel)
    return 0


cdef int relay_request(Router router, Session target, Session origin, uint16_t channel,
                       object data, uint64_t correlation, uint32_t milliseconds) except -1:
    # A request on its way through this node: to a peer for a guest, or to a guest for a peer.
    cdef uint8_t extend[2 + REQUEST_EXTEND]
    cdef int prefix = 2 if target.role == ROLE_GUEST else 0
    cdef Request request
    if origin.role == ROLE_GUEST and origin.relayed >= <uint32_t>GUEST_REQUESTS:
        router.count("refused_guest_requests")
        raise errors.Overloaded(
            f"{origin.relayed} requests of this guest are in flight, as many as it may have",
            channel=channel, limit=GUEST_REQUESTS)
    request = open_request(
        router, target, channel,
        None if milliseconds == NO_DEADLINE else max(1, milliseconds) * 1e-3)
    request.origin = origin
    request.origin_correlation = correlation
    origin.relayed += 1
    store16(extend, <uint16_t>(origin.peer if origin.peer >= 0 else router.id))
    extend[prefix] = TAG_REQUEST
    store64(extend + prefix + 1, request.correlation)
    store32(extend + prefix + 9, milliseconds)
    try:
        target.put(channel, data, extend, <uint16_t>(prefix + REQUEST_EXTEND))
    except BaseException:
        if request.origin is None:
            return 0        # the target went, and with it the request: its outcome is on its way
        request.origin = None
        origin.relayed -= 1
        request.release()
        raise
    return 0


cdef int relay_answer(Router router, Request request, int state, object value) except -1:
    # A relayed request has ended: pass its outcome on.
    cdef Session origin = request.origin
    cdef uint8_t extend[ANSWER_EXTEND]
    request.origin = None
    origin.relayed -= 1
    if origin.state == SESSION_CLOSED or state == REQUEST_CANCELLED:
        return 0
    extend[8] = STATUS_OK
    if state == REQUEST_FAILED:
        extend[8], value = status_of(value)
    store64(extend, request.origin_correlation)
    try:
        if extend[8] == STATUS_OK:
            try:
                origin.put(CH_ANSWER, value, extend, ANSWER_EXTEND)
                return 0
            except errors.Overloaded as error:
                extend[8], value = status_of(error)
        origin.put_failure(CH_ANSWER, value, extend, ANSWER_EXTEND)
    except (errors.Overloaded, errors.PeerLost):
        router.count("answers_lost")
    return 0


cdef int relay_reply(Router router, Session session, RawFrame* frame) except -1:
    # The reply to a guest's call: the number in the extend says which guest's.
    cdef uint32_t token = load32(frame.extend + 1)
    cdef ChannelEntry* entry = &router.channels[frame.channel]
    cdef Session guest
    if token == 0 and entry.handler is not NULL:
        return router.run_handler(entry, session, frame)
    guest = router.guests.get(token)
    if guest is None:
        return router.count("replies_for_lost_guests")
    return relay_frame(router, guest, session, frame, extend_for_guest(session, frame, 0))


cdef bytes extend_for_guest(Session source, RawFrame* frame, uint16_t size):
    # The sender's machine id before so much of the frame's own.
    cdef bytes extend = PyBytes_FromStringAndSize(NULL, 2 + size)
    cdef uint8_t* p = <uint8_t*>PyBytes_AS_STRING(extend)
    store16(p, <uint16_t>source.peer)
    copy(p + 2, frame.extend, size)
    return extend


cdef int relay_frame(Router router, Session guest, Session source, RawFrame* frame,
                     bytes extend) except -1:
    # A frame for a guest.
    try:
        write_frame(guest, frame.channel, frame.data, frame.size,
                    <uint8_t*>PyBytes_AS_STRING(extend), <uint16_t>len(extend), frame.owner)
    except (errors.Overloaded, errors.FrameError):
        router.count("refused_guest_queue_full")
        if frame.extend_size == 1 and frame.extend[0] == TAG_PUBLISH:
            drop(guest, frame.channel, 1)       # its sender is told nothing of it
        router.reject(source, STATUS_OVERLOADED, frame)
    except errors.PeerLost:
        router.reject(source, STATUS_PEER_LOST, frame)
    return 0


cdef int relay_reject(Router router, RawFrame* frame, bytes data, uint16_t size) except -1:
    # A guest has not taken what its node passed on to it: the sender's id stands first.
    if size < 2:
        return router.count("dropped_not_negotiated")
    return tell_sender(router, frame.extend[0], load16(frame.extend + 1),
                       data[0] | data[1] << 8, data[2:size], data[size:])


cdef int guest_frame_lost(Router router, object frame) except -1:
    # The guest went before it was sent this. A request ends by itself, and a publish is nobody's
    # in particular once it has left its sender.
    cdef bytes extend = frame.extend[2:]
    cdef int sender = int.from_bytes(frame.extend[:2], "little")
    if is_request(extend) or (sender != router.id and extend == bytes([TAG_PUBLISH])):
        return 0
    return tell_sender(router, STATUS_PEER_LOST, frame.channel, sender, extend, frame.data)


cdef int tell_sender(Router router, uint8_t status, uint16_t channel, int sender, bytes extend,
                     bytes data) except -1:
    # That a guest of this node did not get a frame: this node's own on_error, or the peer's.
    cdef uint8_t out[REJECT_EXTEND]
    cdef Session target = router.session(sender)
    if sender == router.id or target is None or not target.extended:
        router.count("rejected")
        return router.report(failure(status, b"", channel, sender), Frame(channel, data, extend))
    out[0] = status
    store16(out + 1, channel)
    store16(out + 3, <uint16_t>len(extend))
    try:
        lane_of(target, channel).put(CH_REJECT, extend + data, out, REJECT_EXTEND)
    except (errors.Overloaded, errors.FrameError, errors.PeerLost):
        router.count("rejects_lost")
    return 0


cdef bytes relayed_extend(const uint8_t* p, uint16_t size, int node):
    # What the extend of a guest's message would be if its node had sent it on its own account.
    if p[0] == VERB_CALL:
        return node.to_bytes(2, "little") + PyBytes_FromStringAndSize(<char*>p + 5, 2)
    if p[0] == VERB_PIPELINE:
        return bytes([TAG_PIPELINE]) + PyBytes_FromStringAndSize(
            <char*>p + RELAY_EXTEND, size - RELAY_EXTEND)
    return b""


cdef int uplink_frame_lost(Router router, Session uplink, object frame) except -1:
    # The guest's side: its node went before it was sent this.
    cdef bytes extend = frame.extend
    cdef const uint8_t* p = <const uint8_t*>PyBytes_AS_STRING(extend)
    if frame.channel != CH_RELAY or p[0] == VERB_REQUEST:
        return 0
    return router.report(
        errors.PeerLost("this guest's node went before the frame was sent", channel=load16(p + 1),
                        peer=uplink.peer),
        Frame(load16(p + 1), frame.data, relayed_extend(p, <uint16_t>len(extend), uplink.peer)))


cdef int deliver_shared(Router router, Session session, RawFrame* frame) except -1:
    # A channel that guests of this node subscribe to, beside or instead of the node itself.
    cdef ChannelEntry* entry = &router.channels[frame.channel]
    cdef Session guest
    cdef uint32_t i, count = entry.guests.count
    cdef bint own = entry.handler is not NULL
    if not session.extended:
        # A plain peer's frame reads the same with a tag that says what it may be.
        count = count if frame.extend_size == 0 else 0
    if frame.extend_size == 1 and frame.extend[0] == TAG_PUBLISH:
        if count:
            extend = extend_for_guest(session, frame, 1)
            for guest in members_of(&entry.guests):
                relay_frame(router, guest, session, frame, extend)
        if own and entry.handler is not NULL:
            router.run_handler(entry, session, frame)
        return 0
    i = entry.guests.cursor
    if i >= count + own:
        i = 0
    entry.guests.cursor = i + 1
    if i < count:
        guest = <Session><object>entry.guests.members[i]
        if frame.extend_size == REQUEST_EXTEND and frame.extend[0] == TAG_REQUEST:
            data = frame_data(frame)
            try:
                relay_request(router, guest, session, frame.channel, data,
                              load64(frame.extend + 1), load32(frame.extend + 9))
            except errors.DomiError as error:
                router.reject(session, status_of(error)[0], frame)
            return 0
        if frame.extend_size > 0xFFFD:
            return router.count("dropped_extend_too_long")
        return relay_frame(router, guest, session, frame,
                           extend_for_guest(session, frame, frame.extend_size))
    if not own:
        router.count("dropped_no_subscriber")
        return router.reject(session, STATUS_NO_SUBSCRIBER, frame)
    return router.run_handler(entry, session, frame)
