# Who subscribes to what and takes new work: the route of each channel, and how the peers are told.
#
# Invariants: a route holds borrowed sessions, each of which the peer table, the guest table or
# `loopback` keeps alive; a closed session stands in none, and neither does one whose peer is paused
# or drains; this node stands in the route of a channel while it serves and it, or a guest of it,
# subscribes. Owned by the loop thread.

cdef enum:
    CHANNELS_A_FRAME = 2000     # of a list of subscriptions: it fits the smallest frame_limit


cdef int route_add(Route** place, Session session) except -1:
    cdef Route* route = place[0]
    cdef PyObject** members
    cdef uint32_t i, capacity
    if route is NULL:
        route = <Route*>calloc(1, sizeof(Route))
        if route is NULL:
            raise MemoryError
        place[0] = route
    for i in range(route.count):
        if route.members[i] is <PyObject*>session:
            return 0
    if route.count == route.capacity:
        capacity = max(<uint32_t>4, route.capacity * 2)
        members = <PyObject**>realloc(route.members, 2 * capacity * sizeof(PyObject*))
        if members is NULL:
            raise MemoryError
        memmove(members + capacity, members + route.capacity, route.count * sizeof(PyObject*))
        route.members = members
        route.candidates = members + capacity
        route.capacity = capacity
    route.members[route.count] = <PyObject*>session
    route.candidates[route.count] = <PyObject*>session.candidate
    route.count += 1
    return 0


cdef void route_remove(Route** place, Session session) noexcept:
    # An empty route is freed: a channel that is not in use costs nothing.
    cdef Route* route = place[0]
    cdef uint32_t i
    if route is NULL:
        return
    for i in range(route.count):
        if route.members[i] is <PyObject*>session:
            route.count -= 1
            memmove(&route.members[i], &route.members[i + 1],
                    (route.count - i) * sizeof(PyObject*))
            memmove(&route.candidates[i], &route.candidates[i + 1],
                    (route.count - i) * sizeof(PyObject*))
            if route.cursor > i:
                route.cursor -= 1
            break
    if route.count == 0:
        free(route.members)
        free(route)
        place[0] = NULL


cdef inline Session route_next(Route* route):
    cdef uint32_t i = route.cursor
    if i >= route.count:
        i = 0
    route.cursor = i + 1
    return <Session><object>route.members[i]


cdef list members_of(Route** slot):
    # All sessions of a route. To make the list may run the collector, and thereby what a program
    # has given it to call, which may change the route: it is looked at again then.
    cdef Route* route
    cdef uint32_t i, count
    cdef list found
    while True:
        if slot[0] is NULL:
            return []
        count = slot[0].count
        found = PyList_New(count)
        route = slot[0]
        if route is not NULL and route.count == count:
            for i in range(count):
                Py_INCREF(<object>route.members[i])
                PyList_SET_ITEM(found, i, <object>route.members[i])
            return found


cdef void free_route(Route* route) noexcept:
    if route is not NULL:
        free(route.members)
        free(route)


cdef void settle_entry(Router router, int channel) noexcept:
    # Its handler or its guests have changed.
    cdef ChannelEntry* entry = &router.channels[channel]
    entry.direct = (channel <= USER_LAST and entry.handler is not NULL and entry.guests is NULL)


cdef bint is_local(Router router, int channel) noexcept:
    cdef ChannelEntry* entry = &router.channels[channel]
    return entry.handler is not NULL or entry.guests is not NULL


cdef int now_local(Router router, int channel) except -1:
    # The first of: a handler here, a guest that subscribes.
    if router.loopback is not None and not routed_here(router, channel):
        route_here(router, channel)
        announce(router, SUBSCRIBED_ADD, (channel,))
        router.mesh.routes_changed()
    elif router.uplink is not None:
        announce(router, SUBSCRIBED_ADD, (channel,))
    return 0


cdef int maybe_not_local(Router router, int channel) except -1:
    if is_local(router, channel):
        return 0
    if router.loopback is not None:
        route_remove(&router.channels[channel].route, router.loopback)
    announce(router, SUBSCRIBED_REMOVE, (channel,))
    return 0


cdef int route_here(Router router, int channel) except -1:
    if router.state == STATE_SERVING:
        route_add(&router.channels[channel].route, router.loopback)
    return 0


cdef bint routed_here(Router router, int channel) noexcept:
    cdef Route* route = router.channels[channel].route
    cdef uint32_t i
    if route is not NULL:
        for i in range(route.count):
            if route.members[i] is <PyObject*>router.loopback:
                return True
    return False


cdef object local_channels(Router router):
    cdef int channel
    return [channel for channel in range(MAX_CHANNELS) if is_local(router, channel)]


cdef int announce(Router router, uint8_t operation, object channels) except -1:
    cdef Session session
    if router.engine is None:
        return 0
    for session in router.sessions():
        if session.extended and session.role != ROLE_GUEST:
            announce_to(router, session, operation, channels)
            # At once: a message that is sent next may be quicker at its last receiver.
            session.flush()
    return 0


cdef int announce_to(Router router, Session session, uint8_t operation, object channels) except -1:
    # A list that is longer than a small frame goes on in further frames.
    cdef bytes data
    cdef Py_ssize_t begin = 0
    if session.state == SESSION_CLOSED:
        return 0
    if session.queue.queued >= router.queue_limit + router.queue_limit // 4:
        session.fail("it takes nothing, and cannot be told of a change of subscriptions")
        return 0
    while begin == 0 or begin < len(channels):
        data = b"".join([int(channel).to_bytes(2, "little")
                         for channel in channels[begin:begin + CHANNELS_A_FRAME]])
        append_frame(session.queue, CH_SUBSCRIPTIONS, <uint8_t*>PyBytes_AS_STRING(data), len(data),
                     &operation, 1, NULL)
        begin += CHANNELS_A_FRAME
        if operation == SUBSCRIBED_ALL:
            operation = SUBSCRIBED_ADD
    router.engine.mark_dirty(session)
    return 0


cdef int handle_subscriptions(Router router, Session session, RawFrame* frame) except -1:
    cdef uint8_t operation
    cdef uint32_t i
    cdef set channels = set()
    cdef bint first = not session.announced
    cdef list fresh = []
    if session.role == ROLE_UPLINK:
        return router.count("dropped_not_negotiated")
    if (frame.extend_size != 1 or frame.extend[0] > SUBSCRIBED_REMOVE
            or frame.size % 2 or frame.size > 2 * MAX_CHANNELS):
        session.fail("a malformed list of subscriptions", True)
        return 0
    operation = frame.extend[0]
    for i in range(0, frame.size, 2):
        channels.add(load16(frame.data + i))
    if operation != SUBSCRIBED_REMOVE:
        count = len(channels if operation == SUBSCRIBED_ALL else channels | session.channels)
        if count > router.channel_limit:
            session.fail(f"it subscribes to {count} channels: at most {router.channel_limit} "
                         "(channel_limit) are allowed", True)
            return 0
    if operation == SUBSCRIBED_ALL:
        drop_routes(router, session, session.channels - channels)
    if operation == SUBSCRIBED_REMOVE:
        drop_routes(router, session, channels)
    else:
        for channel in channels - session.channels:
            if channel > CH_NIL:
                continue        # served by the core of each node, and not routed
            if session.role == ROLE_GUEST:
                if channel < USER_FIRST:
                    continue
                if has_subscribers_enough(router, channel):
                    return refuse_subscriber(router, session, channel)
                route_add(&router.channels[<int>channel].guests, session)
                settle_entry(router, channel)
                session.channels.add(channel)
                if not routed_here(router, channel):
                    route_here(router, channel)
                    fresh.append(channel)
            else:
                session.channels.add(channel)
                if takes_work(session):
                    route_add(&router.channels[<int>channel].route, session)
    session.announced = True
    if fresh:
        announce(router, SUBSCRIBED_ADD, fresh)
        router.mesh.routes_changed()
    if session.role != ROLE_GUEST:
        if first:
            read_lanes(session)
            router.mesh.listed(session)
        else:
            router.mesh.routes_changed()
    return 0


cdef bint has_subscribers_enough(Router router, int channel) noexcept:
    cdef Route* guests = router.channels[channel].guests
    return guests is not NULL and guests.count >= router.subscriber_limit


cdef int refuse_subscriber(Router router, Session session, int channel) except -1:
    # A guest, of which the peers may not have heard yet that it subscribes to others.
    router.count("refused_subscribers")
    session.close(f"{router.subscriber_limit} guests subscribe to channel {channel}, as many as "
                  "may (subscriber_limit)")
    return 0


cdef int drop_routes(Router router, Session session, set channels) except -1:
    cdef list gone = []
    for channel in channels & session.channels:
        session.channels.discard(channel)
        if session.role == ROLE_GUEST:
            route_remove(&router.channels[<int>channel].guests, session)
            settle_entry(router, channel)
            if not is_local(router, channel):
                if router.loopback is not None:
                    route_remove(&router.channels[<int>channel].route, router.loopback)
                gone.append(channel)
        else:
            route_remove(&router.channels[<int>channel].route, session)
    if gone:
        announce(router, SUBSCRIBED_REMOVE, gone)
    return 0


cdef bint takes_work(Session session) noexcept:
    return session.state_of_peer == STATE_SERVING and session.parting is None and (
        session.breaker is None or session.breaker.state == CIRCUIT_CLOSED)


cdef int reroute(Router router, Session session) except -1:
    # Whether the peer takes work has changed.
    for channel in session.channels:
        if takes_work(session):
            route_add(&router.channels[<int>channel].route, session)
        else:
            route_remove(&router.channels[<int>channel].route, session)
    router.mesh.routes_changed()
    return 0


cdef int greet(Router router, Session session) except -1:
    # What a new peer is told first. Its handshake ends with the first list: one that is to know
    # more before it sends anything has an empty one first.
    channels = local_channels(router)
    if router.state == STATE_SERVING:
        announce_to(router, session, SUBSCRIBED_ALL, channels)
    else:
        announce_to(router, session, SUBSCRIBED_ALL, ())
        for connection in connections_of(session):
            say_state(router, connection)
        announce_to(router, session, SUBSCRIBED_ADD, channels)
    return say_memory(router, session)


cdef int say_memory(Router router, Session session) except -1:
    cdef uint8_t used[2]
    if router.own_memory >= 0 and session.state != SESSION_CLOSED:
        store16(used, <uint16_t>router.own_memory)
        append_frame(session.queue, CH_MEMORY, used, 2, NULL, 0, NULL)
        router.engine.mark_dirty(session)
    return 0


cdef int handle_memory(Router router, Session session, RawFrame* frame) except -1:
    if session.role == ROLE_GUEST or session.role == ROLE_UPLINK:
        return router.count("dropped_not_negotiated")
    if frame.size != 2 or frame.extend_size != 0 or load16(frame.data) > 1000:
        session.fail("a malformed share of memory", True)
        return 0
    session.candidate.memory = load16(frame.data) * 0.001
    return 0


cdef int say_state(Router router, Session session) except -1:
    cdef uint8_t state = <uint8_t>router.state
    cdef uint8_t said = STATE_SAID
    if session.state != SESSION_CLOSED:
        append_frame(session.queue, CH_STATE, &state, 1, &said, 1, NULL)
        session.unheard += 1
        router.engine.mark_dirty(session)
    return 0


cdef int handle_state(Router router, Session session, RawFrame* frame) except -1:
    cdef uint8_t heard = STATE_HEARD
    cdef Session main = main_of(session)
    if session.role == ROLE_GUEST or session.role == ROLE_UPLINK:
        return router.count("dropped_not_negotiated")
    if (frame.size != 1 or frame.extend_size != 1 or frame.data[0] > STATE_DRAINING
            or frame.extend[0] > STATE_HEARD
            or (frame.extend[0] == STATE_HEARD and session.unheard == 0)):
        session.fail("a malformed state", True)
        return 0
    if frame.extend[0] == STATE_HEARD:
        session.unheard -= 1
    else:
        session.states_in += 1
        if session.states_in > main.states_known:      # or another lane was quicker
            main.states_known = session.states_in
            main.state_of_peer = frame.data[0]
            reroute(router, main)
        if not has_room_on_top(session):
            session.fail("it takes nothing, and cannot be told that its state is known")
            return 0
        # Behind all that was sent to the peer before.
        append_frame(session.queue, CH_STATE, frame.data, 1, &heard, 1, NULL)
        router.engine.mark_dirty(session)
        return 0
    router.mesh.routes_changed()
    return 0


cdef object no_subscriber(Router router, int channel):
    # Why nobody takes a message on this channel now: an exception.
    cdef Session session
    cdef list away = [session for session in router.sessions()
                      if not takes_work(session) and channel in session.channels
                      and session.parting is None]
    idle = []
    for session in away:
        if session.state_of_peer == STATE_SERVING:
            return circuit_open(channel, session)
        idle.append(session.peer)
    if router.state != STATE_SERVING and is_local(router, channel):
        idle.append(router.id)
    if idle:
        return errors.NoSubscriber(
            f"whoever subscribes to channel {channel} is paused or drains: "
            f"nodes {sorted(idle)}", channel=channel)
    return errors.NoSubscriber(f"nobody subscribes to channel {channel}", channel=channel)
