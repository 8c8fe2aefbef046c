# From a frame to its handler: the way that most frames take, inlined into the reading of a session.
#
# Invariants: whatever is not quite ordinary (guests, library channels, large messages) goes by
# Router.deliver(), which decides alike; the spare context is shown to one handler at a time. Owned
# by the loop thread.

cdef inline int call_handler(Router router, PyObject* handler, Context context,
                             bint to_its_end) except -1:
    cdef PyObject* result
    Py_INCREF(<object>handler)      # it may unsubscribe itself
    result = call_one(handler, <PyObject*>context)
    if result is <PyObject*>None and not context.is_owed():
        Py_DECREF(None)
        Py_DECREF(<object>handler)
        return 0
    try:
        return handler_ended(router, handler, result, context, to_its_end)
    finally:
        Py_DECREF(<object>handler)


cdef inline Context take_context(Engine engine):
    # One that nobody has: the spare one, if it was given back.
    cdef Context context = engine.spare
    if context is None or context.held or not is_spare(context):
        context = engine.spare = Context.__new__(Context)
    return context


cdef inline int put_context(Engine engine, Context context) except -1:
    # The handler has returned, and may have kept it.
    if engine.spare is context:
        if not is_spare(context):
            engine.spare = None
        elif context.held:
            context.let_go()
    return 0


cdef inline int deliver_whole(Router router, Session session, RawFrame* frame) except -1:
    # What next_whole() gave. What most frames are takes no detour; all others may.
    cdef ChannelEntry* entry = &router.channels[frame.channel]
    cdef RawFrame other
    cdef Context context
    cdef Taker taker
    if not (entry.direct and session.role <= ROLE_ACCEPTOR
            and frame.extend_size != GUEST_REPLY_EXTEND):
        other = frame[0]
        return router.deliver(session, &other)
    if entry.takes:
        other = frame[0]
        taker = <Taker>entry.handler        # a handler that runs within may unsubscribe it
        return taker.accept(session, &other)
    if not fits_context(frame):
        other = frame[0]
        return router.run_handler(entry, session, &other)
    context = take_context(session.engine)
    begin_context(context, session, frame)
    fill_within(context, frame)
    classify(context, session, context.wire + frame.size, frame.extend_size, session.engine.now)
    call_handler(router, entry.handler, context, False)
    return put_context(session.engine, context)
