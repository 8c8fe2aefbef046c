# What becomes of a handler that was called: what it returned or raised, and its task.
#
# Invariants: a request is answered, whatever its handler does, unless its context is kept; a
# handler that raises takes nothing down but the two exceptions that are meant to end the loop.
# Owned by the loop thread.

async def finish(awaitable):
    # A task wants a coroutine, and a handler may return any awaitable.
    await awaitable


cdef bint is_generator_function(object handler) except -1:
    # One that asyncio could not await either: types.coroutine() marks those that it could.
    if inspect.isasyncgenfunction(handler):
        return True
    return inspect.isgeneratorfunction(handler) and not (
        getattr(inspect.unwrap(handler), "__code__", None) is not None
        and inspect.unwrap(handler).__code__.co_flags & inspect.CO_ITERABLE_COROUTINE)


cdef int handler_ended(Router router, PyObject* handler, PyObject* result, Context context,
                       bint to_its_end) except -1:
    # Not just with None: `result` is owned, or NULL when an exception is set.
    if result is NULL:
        return handler_raised(router, context)
    try:
        if context.is_owed():
            context.expect_answer()
        if result is <PyObject*>None:
            return 0
        if to_its_end:
            check_ended(<object>handler, <object>result)
        else:
            handler_returned(router, <object>result, context)
    except TypeError as error:
        handler_failed(router, context, error)
    finally:
        Py_DECREF(<object>result)
    return 0


cdef int handler_raised(Router router, Context context) except -1:
    # An exception is set.
    try:
        reraise()
    except (KeyboardInterrupt, SystemExit):
        if context.is_owed():
            context.expect_answer()
        raise
    except BaseException as error:
        handler_failed(router, context, error)
    return 0


cdef int handler_returned(Router router, object result, Context context) except -1:
    if not PyCoro_CheckExact(<PyObject*>result):
        if not inspect.isawaitable(result):
            return 0
        result = finish(result)
    if <uint32_t>len(router.tasks) >= router.handler_limit:
        result.close()
        return handler_failed(router, context, errors.Overloaded(
            f"{len(router.tasks)} handlers have not finished, as many as a node may have at a "
            "time (handler_limit)", channel=context.channel, limit=router.handler_limit))
    return start_task(router, result, context)


cdef int start_task(Router router, object coroutine, Context context) except -1:
    cdef object loop = context.session.engine.loop
    if EAGER_TASKS:
        task = asyncio.Task(coroutine, loop=loop, eager_start=True)
    else:
        task = loop.create_task(coroutine)
    if task.done():
        task_ended(router, task, context)
    else:
        context.session.engine.turn_due = True
        router.tasks.add(task)
        completion = TaskCompletion.__new__(TaskCompletion)
        (<TaskCompletion>completion).router = router
        (<TaskCompletion>completion).context = context
        task.add_done_callback(completion)
    return 0


cdef int task_ended(Router router, object task, Context context) except -1:
    # An `async def` handler has finished.
    router.tasks.discard(task)
    error = CancelledError("the handler was cancelled") if task.cancelled() \
        else task.exception()
    if error is not None:
        handler_failed(router, context, error)
    return 0


cdef int handler_failed(Router router, Context context, object error) except -1:
    if isinstance(error, errors.Overloaded):
        router.count("handlers_overloaded")
        if context.is_owed():
            answer_failure(router, context, STATUS_OVERLOADED, text_of(error))
        return 0
    router.count("handler_errors")
    log.error("the handler of channel %d failed on a message from node %d", context.channel,
              context.sender, exc_info=error,
              extra={"domi_channel": context.channel, "domi_peer": context.sender})
    if context.is_owed():
        answer_failure(router, context, STATUS_REMOTE_ERROR, remote_error(error))
    return 0


cdef int answer_failure(Router router, Context context, uint8_t status, bytes text) except -1:
    cdef Outbound here = outbound_here()
    context.set_answered()
    if here is not None:
        return here.on_loop(router.send_failure, (context, status, text))
    router.send_failure(context, status, text)
    return 0


@cython.final
cdef class TaskCompletion:
    # The done callback of a handler's task.
    def __call__(self, task):
        cdef Context context = self.context
        self.context = None
        task_ended(self.router, task, context)
