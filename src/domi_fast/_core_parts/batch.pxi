# Handlers of lists: what a batch of the engine brings on a channel goes to Python in one crossing.
#
# Invariant: a list is its handler's to keep and to change; what becomes of its requests goes by a
# tuple of its own. Owned by the loop thread, but for run_several(), which serial threads run too.

cdef int check_plain_handler(object handler, str reason) except -1:
    # One that runs to its end when it is called.
    if not callable(handler):
        raise TypeError(f"handler {handler!r} is not callable")
    if inspect.iscoroutinefunction(handler) or inspect.iscoroutinefunction(
            getattr(handler, "__call__", None)):
        raise TypeError(
            f"handler {handler!r} is an async def: {reason}; use def here")
    if is_generator_function(handler):
        raise TypeError(
            f"handler {handler!r} is a generator, which nobody would run: use def")
    return 0


cdef int check_ended(object handler, object result) except -1:
    # What a handler that must run to its end has returned.
    if result is None or not inspect.isawaitable(result):
        return 0
    if PyCoro_CheckExact(<PyObject*>result):
        result.close()
    raise TypeError(
        f"handler {handler!r} has returned {type(result).__name__}, which nobody will await: "
        "subscribe it at the node, one message at a time")


cdef bytes remote_error(object error):
    # The text of STATUS_REMOTE_ERROR for what a handler raised.
    return text_of(type(error).__name__) + b"\0" + text_of(error)


cdef int run_list(Router router, object handler, list contexts, bint asked) except -1:
    # A handler of lists. Unless one of them is a request (`asked`), nobody waits for any.
    cdef Py_ssize_t count = len(contexts)
    cdef int channel = (<Context>contexts[0]).channel
    return run_several(router, handler, contexts, tuple(contexts) if asked else (), count, channel)


cdef int run_several(Router router, object handler, object argument, tuple contexts,
                     Py_ssize_t count, int channel) except -1:
    # As call_handler(), for several messages at once; what they raise is each one's failure.
    # `contexts`: those that may be requests; `count` and `channel` are for people.
    cdef Context context
    try:
        check_ended(handler, handler(argument))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        several_failed(router, contexts, count, channel, error)
    finally:
        for context in contexts:
            if context.is_owed() and context.unanswered is None:
                context.expect_answer()
    return 0


cdef int several_failed(Router router, tuple contexts, Py_ssize_t count, int channel,
                        object error) except -1:
    cdef Context context
    cdef uint8_t status = STATUS_REMOTE_ERROR
    cdef bytes text = remote_error(error)
    if isinstance(error, errors.Overloaded):
        router.count("handlers_overloaded")
        status, text = STATUS_OVERLOADED, text_of(error)
    else:
        router.count("handler_errors")
        log.error("the handler of %d messages failed, the first of them on channel %d",
                  count, channel, exc_info=error)
    for context in contexts:
        if context.is_owed():
            answer_failure(router, context, status, text)
    return 0


@cython.final
cdef class BatchChannel(Taker):
    cdef int accept(self, Session session, RawFrame* frame) except -1:
        cdef Context context = Context.__new__(Context)
        fill_context(context, session, frame, session.engine.now)
        self.contexts.append(context)
        self.asked |= context.kind == KIND_REQUEST
        if not self.waiting:
            self.waiting = True
            session.engine.ready.append(self)
        if len(self.contexts) == BATCH_MOST:
            return self.run()
        return 0

    cdef int tick(self) except -1:
        self.waiting = False
        return self.run()

    cdef int run(self) except -1:
        cdef list contexts = self.contexts
        cdef bint asked = self.asked
        if not contexts:
            return 0
        self.contexts = []
        self.asked = False
        if self.router.channels[self.channel].handler is not <PyObject*>self:
            self.router.abandon(contexts)
            return 0
        return run_list(self.router, self.handler, contexts, asked)
