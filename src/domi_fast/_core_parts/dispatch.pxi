# One message each way: Context (what a handler gets) and Request (what the asker awaits).
#
# Invariants: a context owns copies of all it shows, so it outlives the batch; it shows another
# message only once nobody has a reference to it. A request settles exactly once, and from then on
# no slot, timer or session points to it. Owned by the loop thread; a Context's reply, next and
# error may be called from any other and are posted.

@cython.final
@cython.no_gc
cdef class Unanswered:
    # Belongs to the context of a request whose handler has returned without an answer: when it goes
    # while it is owed, whoever could have answered is gone, and the asker is told.

    def __dealloc__(self):
        if self.counted:
            self.session.owed -= 1
        if self.owed and self.session.state == SESSION_UP:
            self.session.answer_is_lost(self.correlation)


# Not tracked by the collector: a context leads to a session, which lets go of its router when it
# closes, so that no cycle through a context outlives its node.
@cython.final
@cython.no_gc
@cython.freelist(4096)
cdef class Context:
    """A message that arrived, and the ways to answer it.

    Immutable; everything it holds stays valid after the handler has returned, and it may be
    answered later and from any thread, once.

    :ivar channel: the channel on which it came.
    """

    @property
    def data(self):
        """The message, bytes."""
        if self.whole is None:
            self.whole = PyBytes_FromStringAndSize(<char*>self.wire, self.size)
            self.held = True
        return self.whole

    @property
    def sender(self):
        """Machine id of the node that sent the message (of a guest's node, for a guest)."""
        return self.origin if self.origin >= 0 else self.session.peer

    @property
    def deadline(self):
        """When the asker stops waiting, on this process's ``time.monotonic()``, or None."""
        return None if self.expires == 0 else <double>self.expires * 1e-9

    @property
    def extend(self):
        """The extend as it came, bytes (docs/protocol.md)."""
        return PyBytes_FromStringAndSize(<char*>self.extend_bytes(), self.extend_size)

    @property
    def is_request(self):
        """Whether the sender awaits the answer."""
        return self.kind == KIND_REQUEST

    @property
    def answered(self):
        """Whether ``reply``, ``next`` or ``error`` was called."""
        return bool(self.answered or self.posted)

    def __repr__(self):
        return (f"<Context channel={self.channel} sender={self.sender} "
                f"data={len(self.data)} bytes>")

    cdef inline bint is_owed(self) noexcept:
        # Whether somebody awaits an answer that has yet to be given.
        return self.kind == KIND_REQUEST and not self.answered and not self.posted

    cdef int expect_answer(self) except -1:
        # The handler has returned, and somebody else may answer.
        cdef Unanswered unanswered = Unanswered.__new__(Unanswered)
        unanswered.session = self.session
        unanswered.correlation = load64(self.extend_bytes() + 1)
        unanswered.owed = unanswered.counted = True
        self.session.owed += 1
        self.unanswered = unanswered
        self.held = True
        return 0

    cdef inline void set_answered(self) noexcept:
        self.answered = True
        if self.unanswered is not None:
            self.unanswered.owed = False
            if self.unanswered.counted:
                self.unanswered.counted = False
                self.session.owed -= 1

    cdef void let_go(self) noexcept:
        # Of what the next message must not find.
        self.whole = None
        self.long_extend = None
        self.unanswered = None
        self.held = False

    cdef inline const uint8_t* extend_bytes(self) noexcept:
        if self.long_extend is not None:
            return <const uint8_t*>PyBytes_AS_STRING(self.long_extend) + self.extend_at
        return self.wire + self.extend_at

    cdef Router router(self):
        if self.session.router is None:
            raise self.session.lost_error()
        return self.session.router

    cdef inline int claim(self) except -1:
        # There is one answer to a message.
        return self.refuse_second() if self.answered else 0

    cdef int refuse_second(self) except -1:
        raise errors.AlreadyReplied(
            f"the message on channel {self.channel} from node {self.sender} was answered "
            "before", channel=self.channel, peer=self.sender)

    cdef object foreign(self, str name, object argument):
        # Called from another thread, with everything checked that can be checked there: post.
        cdef Outbound here = outbound_here()
        if self.session.state == SESSION_CLOSED:
            raise self.session.lost_error()
        if name != "error" and not PyBytes_CheckExact(argument):
            argument = bytes_of(argument)
        self.posted = True      # another thread may be about to do the same
        try:
            if here is None or here.engine is not self.session.engine:
                self.session.engine.call_soon_threadsafe(self._posted_answer, name, argument)
            elif name == "reply":
                here.put(VERB_REPLY, self.channel, 0, None, argument, self)
            else:
                here.ask_loop(self.channel, self._posted_answer, (name, argument))
        except BaseException:
            self.posted = False
            raise
        if self.unanswered is not None:
            self.unanswered.owed = False

    def _posted_answer(self, str name, argument):
        """What another thread answered, now on the loop thread."""
        cdef Router router = self.session.router
        try:
            getattr(self, name)(argument)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:
            if router is None:
                log.warning("lost: %s", error)
                return
            router.report(error, Frame(
                self.channel, text_of(argument) if isinstance(argument, str) else argument))
            if self.kind == KIND_REQUEST and not self.answered:
                status, text = status_of(error)
                answer_failure(router, self, status, text)

    cdef inline bint is_foreign(self) except -1:
        # Whether this is another thread than the loop's, which may answer by posting.
        if thread_here() == self.session.engine.thread:
            return False
        return self.check_foreign()

    cdef bint check_foreign(self) except -1:
        if self.session.engine.thread == 0:
            self.session.engine.check_thread()
        if self.posted:
            raise errors.AlreadyReplied(
                f"the message on channel {self.channel} was answered before",
                channel=self.channel, peer=self.sender)
        return True

    cdef int check_reply(self) except -1:
        if self.kind == KIND_NOTIFY:
            raise errors.DomiError(
                f"the message on channel {self.channel} asks for no answer: it was sent with "
                "notify or publish", channel=self.channel, peer=self.sender)
        if self.kind in (KIND_PIPELINE, KIND_UNFIT) or (
                self.kind == KIND_PLAIN and self.extend_size != 4):
            raise errors.FrameError(
                f"the message on channel {self.channel} has no reply address: its extend is "
                f"{self.extend_size} bytes", channel=self.channel, peer=self.sender)
        return 0

    cdef uint16_t check_next(self) except 1:
        # Bytes of the channels that are still to come; even, and so never 1.
        cdef uint16_t size = self.extend_size
        if self.kind == KIND_PIPELINE:
            size -= 1
        elif self.kind != KIND_PLAIN and size:
            raise errors.FrameError(
                f"the message on channel {self.channel} is not part of a pipeline",
                channel=self.channel, peer=self.sender)
        if size == 0:
            raise errors.DomiError(
                f"channel {self.channel} is the last stage of its pipeline",
                channel=self.channel, peer=self.sender)
        if size % 2:
            raise errors.FrameError(
                f"the extend of {size} bytes on channel {self.channel} is not a list of channels",
                channel=self.channel, peer=self.sender)
        return size

    cdef int check_error(self) except -1:
        if self.kind not in (KIND_REQUEST, KIND_CALL, KIND_GUEST_CALL, KIND_PLAIN):
            raise errors.DomiError(
                f"nobody waits for an answer to the message on channel {self.channel}",
                channel=self.channel, peer=self.sender)
        return 0

    def reply(self, data):
        """Answer a ``call`` or a ``request``.

        :param data: bytes-like.
        :raises AlreadyReplied: it was answered before.
        :raises PeerLost: the node that asked is gone.
        :raises FrameError: the message carries no reply address that can be used.
        :raises Overloaded: too much waits for that node; the message may be answered later.
        :raises DomiError: the message was a ``notify`` or ``publish``.
        """
        self.reply_now(data)

    cdef inline int reply_now(self, object data) except -1:
        self.claim()
        if self.kind != KIND_REQUEST and self.kind != KIND_CALL:
            self.check_reply()
        if self.is_foreign():
            self.foreign("reply", data)
            return 0
        if self.kind == KIND_REQUEST:
            self.answer(STATUS_OK, data)
        elif self.kind == KIND_GUEST_CALL:
            self.reply_to_guest(data)
        else:
            self.reply_to_address(data)
        self.set_answered()
        return 0

    cdef int answer_channel(self, uint16_t channel) except -1:
        # A channel that a peer names may not be one that makes the library itself act.
        if not USER_FIRST <= channel <= USER_LAST:
            raise errors.FrameError(
                f"the message on channel {self.channel} names channel {channel} for what follows: "
                "users have 50-65499", channel=self.channel, peer=self.sender)
        return channel

    cdef int reply_to_address(self, object data) except -1:
        cdef const uint8_t* p = self.extend_bytes()
        cdef uint16_t machine = load16(p)
        cdef uint16_t channel = self.answer_channel(load16(p + 2))
        cdef Session target = self.session
        cdef Router router = self.router()
        if router.uplink is not None:
            uplink_send(router, VERB_REPLY, channel, data, 0, machine, 0, NO_DEADLINE, None)
            return 0
        if target.peer != machine or target.state == SESSION_CLOSED:
            target = router.session_to(machine)
        if target.lanes is not None or target.main is not None:
            target = lane_of(main_of(target), channel)
            if is_too_late(target):
                return 0
        write_data(target, channel, data, NULL, 0)
        return 0

    cdef int reply_to_guest(self, object data) except -1:
        # The extend: tag, u16 machine id, u16 reply channel, u32 guest.
        cdef const uint8_t* p = self.extend_bytes()
        cdef uint8_t out[GUEST_REPLY_EXTEND]
        cdef uint16_t channel = self.answer_channel(load16(p + 3))
        cdef Router router = self.router()
        cdef Session target
        if router.uplink is not None:
            uplink_send(router, VERB_REPLY, channel, data, 0, load16(p + 1),
                                <uint64_t>load32(p + 5) | (<uint64_t>1 << 32), NO_DEADLINE, None)
            return 0
        target = lane_of(router.session_to(load16(p + 1)), channel)
        if is_too_late(target):
            return 0
        out[0] = TAG_GUEST_REPLY
        copy(out + 1, p + 5, 4)
        target.put(channel, data, out, GUEST_REPLY_EXTEND)
        return 0

    cdef int answer(self, uint8_t status, object data) except -1:
        # The extend of a request: tag, u64 correlation, u32 milliseconds.
        cdef uint8_t out[ANSWER_EXTEND]
        if self.session.state == SESSION_CLOSED:
            raise self.session.lost_error()
        if is_too_late(self.session):
            return 0
        copy(out, self.extend_bytes() + 1, 8)
        out[8] = status
        if status == STATUS_OK:
            self.session.put(CH_ANSWER, data, out, ANSWER_EXTEND)
        else:
            self.session.put_failure(CH_ANSWER, data, out, ANSWER_EXTEND)
        return 0

    def next(self, data):
        """Hand the message's successor to the next stage of its pipeline.

        :param data: bytes-like.
        :raises NoSubscriber: nobody subscribes to the next stage.
        :raises AlreadyReplied: it was called before.
        :raises FrameError: the extend is not a list of channels.
        :raises DomiError: this is the last stage.
        """
        cdef const uint8_t* p
        cdef uint16_t size, channel
        self.claim()
        size = self.check_next()
        p = self.extend_bytes() + (self.extend_size - size)
        channel = self.answer_channel(load16(p))
        if self.is_foreign():
            here = outbound_here()
            if here is not None and here.engine is self.session.engine:
                here.check_route(channel, None, True)
            return self.foreign("next", data)
        self.router().send_stage(channel, data, p + 2, size - 2)
        self.set_answered()

    def error(self, message):
        """Answer a request with RemoteError (type ``Error``); log it for a plain call.

        :param message: text for the asker.
        :raises AlreadyReplied: it was answered before.
        :raises PeerLost: the node that asked is gone.
        :raises DomiError: nobody asked: the message was a notify, a publish or a pipeline's.
        """
        self.claim()
        self.check_error()
        if self.is_foreign():
            return self.foreign("error", str(message))
        if self.kind == KIND_REQUEST:
            self.answer(STATUS_REMOTE_ERROR, b"Error\0" + text_of(message))
        else:
            self.router().count("call_errors")
            log.warning("channel %d: a call from node %d failed: %s", self.channel, self.sender,
                        message)
        self.set_answered()


cdef inline bint is_spare(Context context) noexcept:
    # Of the spare context, in a variable of the caller's: whether nobody else has it.
    return Py_REFCNT(<PyObject*>context) == 2


cdef inline bint fits_context(RawFrame* frame) noexcept:
    return frame.owner is NULL and frame.size + frame.extend_size <= CONTEXT_WIRE


cdef inline void begin_context(Context context, Session session, RawFrame* frame) noexcept:
    # `context` is new or has been let go of.
    if context.session is not session:
        context.session = session
    context.channel = frame.channel
    context.answered = False
    context.posted = False
    context.origin = -1
    context.expires = 0


cdef inline void fill_within(Context context, RawFrame* frame) noexcept:
    # A message that fits_context(): without an owner, the extend follows upon the data.
    copy(context.wire, frame.data, frame.size + frame.extend_size)
    context.size = frame.size
    context.extend_at = <uint8_t>frame.size


cdef int fill_apart(Context context, RawFrame* frame) except -1:
    # A message that is too large for the context itself, or has an owner.
    context.held = True
    context.whole = frame_data(frame)
    context.extend_at = 0
    if frame.extend_size <= CONTEXT_WIRE:
        copy(context.wire, frame.extend, frame.extend_size)
    else:
        context.long_extend = PyBytes_FromStringAndSize(<char*>frame.extend, frame.extend_size)
    return 0


cdef inline void classify(Context context, Session session, const uint8_t* p, uint16_t size,
                          uint64_t now) noexcept:
    # By its extend, at `p`; `now` is when it came.
    cdef uint32_t milliseconds
    if session.role == ROLE_UPLINK and size >= 2:
        # A node tells its guest who sent the frame before the extend itself.
        context.origin = load16(p)
        context.extend_at += 2
        p += 2
        size -= 2
    context.extend_size = size
    if size == 0:
        context.kind = KIND_NOTIFY
    elif not session.extended:
        context.kind = KIND_PLAIN if size % 2 == 0 else KIND_UNFIT
    elif size == 4:
        context.kind = KIND_CALL
    elif size == REQUEST_EXTEND and p[0] == TAG_REQUEST:
        context.kind = KIND_REQUEST
        milliseconds = load32(p + 9)
        if milliseconds != NO_DEADLINE:
            context.expires = now + <uint64_t>milliseconds * 1000000ULL
    elif size % 2 and p[0] == TAG_PIPELINE:
        context.kind = KIND_PIPELINE
    elif size == 1 and p[0] == TAG_PUBLISH:
        context.kind = KIND_NOTIFY
    elif size == GUEST_CALL_EXTEND and p[0] == TAG_GUEST_CALL:
        context.kind = KIND_GUEST_CALL
    else:
        context.kind = KIND_UNFIT


cdef inline int fill_context(Context context, Session session, RawFrame* frame,
                             uint64_t now) except -1:
    begin_context(context, session, frame)
    if fits_context(frame):
        fill_within(context, frame)
        classify(context, session, context.wire + frame.size, frame.extend_size, now)
    else:
        fill_apart(context, frame)
        classify(context, session, context.extend_bytes(), frame.extend_size, now)
    return 0


cdef class WakeupProbe:
    # Both the loop and the awaitable of a task that is never seen by anyone: what the task wants
    # called when the awaitable is done is its wake-up, of whose kind all tasks' wake-ups are.
    cdef object wakeup
    cdef public bint _asyncio_future_blocking

    def call_soon(self, callback, *arguments, context=None):
        callback(*arguments)

    def get_debug(self):
        return False

    def get_loop(self):
        return self

    def add_done_callback(self, callback, *, context=None):
        self.wakeup = callback

    def result(self):
        return None

    def __await__(self):
        self._asyncio_future_blocking = True
        yield self


async def await_probe(probe):
    await probe


cdef object wakeup_type = None      # of the callback by which a task is resumed
cdef void* wakeup_function = NULL   # with 3.12 and later, where that type is a common one


cdef int find_wakeup() except -1:
    global wakeup_type, wakeup_function
    cdef WakeupProbe probe = WakeupProbe()
    coroutine = await_probe(probe)
    try:
        task = asyncio.Task(coroutine, loop=probe)
        wakeup = probe.wakeup
        wakeup(probe)
    except Exception:
        coroutine.close()
        return 0            # an asyncio that steps tasks on real loops only: no short cut there
    if task.done() and type(wakeup).__module__ != "builtins":
        wakeup_type = type(wakeup)
    elif task.done() and PyCFunction_CheckExact(<PyObject*>wakeup):
        wakeup_type = type(wakeup)
        wakeup_function = PyCFunction_GetFunction(<PyObject*>wakeup)
    return 0


find_wakeup()


cdef inline bint is_task_wakeup(object callback) noexcept:
    return type(callback) is wakeup_type and (
        wakeup_function is NULL
        or PyCFunction_GetFunction(<PyObject*>callback) is wakeup_function)


@cython.final
@cython.freelist(1024)
cdef class Request:
    """The answer to a ``request``: await it, once or often.

    It keeps asyncio's future protocol, so that ``gather``, ``shield``, ``wait_for`` and
    cancellation work, but a coroutine that awaits it directly is resumed without a future, and
    within the batch that brought the answer.
    """

    # ------------------------------------------------------------------------------ the awaitable

    def __await__(self):
        return self

    def __iter__(self):
        return self

    def __next__(self):
        if self.state == REQUEST_PENDING:
            if self.blocking:
                raise RuntimeError("await was not used with this request")
            self.blocking = True
            return self
        raise StopIteration(self.result())

    @property
    def _asyncio_future_blocking(self):
        return self.blocking

    @_asyncio_future_blocking.setter
    def _asyncio_future_blocking(self, bint value):
        self.blocking = value

    # -------------------------------------------------------------------- asyncio's future protocol

    def get_loop(self):
        return self.engine.loop

    def done(self):
        """Whether it ended: answered, failed or cancelled."""
        return self.state != REQUEST_PENDING

    def cancelled(self):
        return self.state == REQUEST_CANCELLED

    def result(self):
        """The answer (bytes); raises what the request ended with."""
        if self.state == REQUEST_DONE:
            return self.result_value
        if self.state == REQUEST_FAILED:
            raise self.result_value
        if self.state == REQUEST_CANCELLED:
            raise self.cancelled_error()
        raise InvalidStateError("the request has not ended")

    def exception(self):
        """The exception that it ended with, or None when it was answered."""
        if self.state == REQUEST_FAILED:
            return self.result_value
        if self.state == REQUEST_CANCELLED:
            raise self.cancelled_error()
        if self.state == REQUEST_PENDING:
            raise InvalidStateError("the request has not ended")
        return None

    cdef object cancelled_error(self):
        if self.result_value is None:
            return CancelledError()
        return CancelledError(self.result_value)

    # What gather() asks of a future that was cancelled.

    def _make_cancelled_error(self):
        return self.cancelled_error()

    @property
    def _cancel_message(self):
        return self.result_value if self.state == REQUEST_CANCELLED else None

    def cancel(self, msg=None):
        """Stop waiting; the work at the other node is not stopped. False when it had ended."""
        if self.state != REQUEST_PENDING:
            return False
        self.settle(REQUEST_CANCELLED, msg, False)
        return True

    def add_done_callback(self, callback, *, context=None):
        if self.state != REQUEST_PENDING:
            if context is None:
                context = PyContext_CopyCurrent()
            self.engine.loop.call_soon(callback, self, context=context)
            return
        if context is None:
            context = PyContext_CopyCurrent()
        if self.callback is None:
            self.callback = callback
            self.context = context
        else:
            if self.more is None:
                self.more = []
            self.more.append((callback, context))

    def remove_done_callback(self, callback):
        """Take the callback off; how many times it was there."""
        cdef list kept = []
        cdef int removed = 0
        waiting = [] if self.callback is None else [(self.callback, self.context)]
        if self.more is not None:
            waiting += self.more
        for pair in waiting:
            if pair[0] == callback:
                removed += 1
            else:
                kept.append(pair)
        self.callback = self.context = self.more = None
        if kept:
            self.callback, self.context = kept[0]
            self.more = kept[1:] or None
        return removed

    # --------------------------------------------------------------------------------- its one end

    cdef int release(self, bint answered=False) except -1:
        # Leaves the slot, the wheel and the session.
        cdef Router router = self.router
        cdef uint32_t slot
        if router is None:
            return 0
        if self.candidate is not None:
            self.candidate.outstanding -= 1
            if self.began:
                self.measure(answered)
        if self.waiting is not None:
            stop_waiting(self.session, self.waiting)
        slot = <uint32_t>(self.correlation & SLOT_MASK)
        router.engine.wheel.remove(&self.deadline.node)
        free_slot(router, slot)
        self.router = None
        self.session = None
        self.correlation = 0
        return 0

    cdef int measure(self, bint answered) except -1:
        cdef uint64_t now = monotonic_ns()
        cdef double latency = <double>(now - self.began)
        # A failure may be quick, which is no merit.
        if answered or latency > self.candidate.latency_ns:
            self.candidate.answered_in(latency, now)
        return 0

    cdef int settle(self, int state, object value, bint inline_wake) except -1:
        # Runs the first callback here and now when the caller is the outermost frame loop, where
        # no task is running; everything else goes through call_soon.
        cdef object callback = self.callback
        cdef object context = self.context
        cdef list more = self.more
        cdef PyObject* outcome
        cdef Router router = self.router
        if self.state != REQUEST_PENDING:
            return 0
        if (state == REQUEST_FAILED and self.waiting is None
                and isinstance(value, errors.DeadlineExceeded)):
            request_failed(router, self.session)
        self.release(state == REQUEST_DONE)
        self.state = state
        self.result_value = value
        self.blocking = False
        if self.origin is not None:
            relay_answer(router, self, state, value)
            return 0
        if callback is None:
            return 0
        self.callback = None
        self.context = None
        self.more = None
        if more is not None:
            for other in more:
                self.engine.loop.call_soon(other[0], self, context=other[1])
        if not inline_wake:
            self.engine.turn_due = True
            self.engine.loop.call_soon(callback, self, context=context)
            return 0
        PyContext_Enter(context)
        # A task's own wake-up looks at its argument only to see whether it failed, by way of three
        # slow calls unless it is a plain future; the task asks this request itself when it resumes.
        outcome = call_one(<PyObject*>callback, <PyObject*>(
            self.engine.finished if is_task_wakeup(callback) else self))
        PyContext_Exit(context)
        if outcome is NULL:
            return self.callback_raised(callback)
        Py_DECREF(<object>outcome)
        return 0

    cdef int callback_raised(self, object callback) except -1:
        # An exception is set.
        try:
            reraise()
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:
            self.engine.loop.call_exception_handler({
                "message": f"the done callback {callback!r} of a request raised",
                "exception": error, "future": self})
        return 0

    cdef int expire(self) except -1:
        # The wheel: the deadline has passed.
        cdef int peer = self.session.peer
        self.settle(REQUEST_FAILED, errors.DeadlineExceeded(
            f"no answer on channel {self.channel} from node {peer} within {self.timeout:g} s",
            channel=self.channel, peer=peer, limit=self.timeout), False)
        return 0


cdef PySendResult send_request(object request, object value, PyObject** result) noexcept:
    # am_send: what `await` runs. Like __next__, without a StopIteration to carry the answer.
    cdef Request self = <Request>request
    result[0] = NULL
    try:
        if self.state == REQUEST_PENDING:
            if self.blocking:
                raise RuntimeError("await was not used with this request")
            self.blocking = True
            Py_INCREF(self)
            result[0] = <PyObject*>self
            return PYGEN_NEXT
        outcome = self.result()
        Py_INCREF(outcome)
        result[0] = <PyObject*>outcome
        return PYGEN_RETURN
    except BaseException as error:
        PyErr_SetObject(type(error), error)
        return PYGEN_ERROR


cdef extern from *:
    """
    /* Cython has no name for am_send, nor CPython a public one for its flag, bit 21 since 3.10.
       Called once, before the type is used. */
    static void domi_set_am_send(PyObject *type, void *send)
    {
        ((PyTypeObject *)type)->tp_as_async->am_send = (sendfunc)send;
        ((PyTypeObject *)type)->tp_flags |= 1UL << 21;
    }
    /* The core makes the instances; one made by a program would have no session. */
    static PyObject *domi_refuse_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
    {
        (void)args; (void)kwargs;
        return PyErr_Format(PyExc_TypeError, "cannot create '%s' instances", type->tp_name);
    }
    static void domi_no_constructor(PyObject *type)
    {
        ((PyTypeObject *)type)->tp_new = domi_refuse_new;
        ((PyTypeObject *)type)->tp_vectorcall = NULL;
    }
    """
    void set_am_send "domi_set_am_send"(object kind, void* send)
    void no_constructor "domi_no_constructor"(object kind)


set_am_send(Request, <void*>send_request)
no_constructor(Request)
no_constructor(Context)
no_constructor(Timer)
