# The verbs: what they are called and what they take, for whatever can send. A router sends from the
# loop thread, an Outbound from a serial thread.

cdef inline int channel_number(object channel) except -1:
    # Nearly always a small int that is in range; everything else is looked at in full.
    cdef long number = small_int(channel)
    return <int>number if USER_FIRST <= number <= USER_LAST else check_channel(channel)


cdef int check_channel(object channel) except -1:
    # For the verbs and subscriptions: 50-65499, or a library channel by name.
    cdef long number
    cdef int overflow = 0
    if not PyLong_Check(channel):
        raise TypeError(f"channel {channel!r}: a channel is an int")
    number = PyLong_AsLongAndOverflow(channel, &overflow)
    if not overflow and USER_FIRST <= number <= USER_LAST:
        return <int>number
    if not isinstance(channel, library_channel):
        raise ValueError(
            f"channel {channel}: users have 50-65499; the library's own channels are "
            "members of LibraryChannel")
    if CH_NIL < number <= CH_LANE:
        raise ValueError(f"channel {number} ({channel.name}) is served by the core")
    return <int>number


cdef class Verbs:
    """Sends, on the channels and to the peers of one node (or of a guest, through its node)."""

    # `keyless`: what is sent has no place for a key=, so a policy that goes by one takes this
    # node's address.

    cdef int send_notify(self, int channel, object data, object to, bint keyless) except -1:
        raise NotImplementedError

    cdef int send_publish(self, int channel, object data, object to) except -1:
        # How many nodes it was sent to.
        raise NotImplementedError

    cdef int send_call(self, int channel, object data, int reply, object to,
                       bint keyless) except -1:
        raise NotImplementedError

    cdef object send_request(self, int channel, object data, object timeout, object to):
        raise NotImplementedError

    cdef int send_stages(self, list channels, object data) except -1:
        raise NotImplementedError

    cdef object chosen(self, int channel, object to, object key, object policy):
        # The machine id of the subscriber that a policy chooses.
        raise NotImplementedError

    def notify(self, channel, data, *, to=None, key=None, policy=None):
        """Send to one subscriber; no answer.

        :param channel: 50-65499.
        :param data: bytes-like.
        :param to: machine id of the subscriber that shall get it. Without it, the channel's policy
            chooses: round robin, unless another was set.
        :param key: a str, bytes or an int, for policies that go by one; where the channel has no
            policy, the same subscriber for the same key.
        :param policy: for this message: a name, or an object (:mod:`domi_fast.balance`).
        :raises ValueError: there is no such policy, or it goes by a key and none was given.
        :raises NoSubscriber: nobody subscribes (or ``to`` does not).
        :raises PeerLost: there is no session with ``to``.
        :raises Overloaded: too much waits for that subscriber already.
        :raises FrameError: the data is larger than a frame may be.
        """
        cdef int number = channel_number(channel)
        if key is not None or policy is not None:
            to = self.chosen(number, to, key, policy)
        self.send_notify(number, data, to, False)

    def publish(self, channel, data, *, to=None):
        """Send to every subscriber; no answer.

        A subscriber that cannot be sent to (its queue is full) does not hold up the others: it is
        reported to ``on_error``.

        :param to: machine id: only to the subscribers at that node.
        :returns: the number of nodes that it was sent to (0 when nobody subscribes; a guest, which
            leaves the sending to its node, gets 1).
        :raises FrameError: the data is larger than a frame may be.
        """
        return self.send_publish(channel_number(channel), data, to)

    def call(self, channel, data, reply_channel, *, to=None, key=None, policy=None):
        """Send to one subscriber; its reply arrives here on ``reply_channel``.

        Chooses and raises as :meth:`notify` does.
        """
        cdef int number = channel_number(channel)
        if key is not None or policy is not None:
            chosen = self.chosen(number, to, key, policy)
            self.send_call(number, data, channel_number(reply_channel), chosen, False)
        else:
            self.send_call(number, data, channel_number(reply_channel), to, False)

    def request(self, channel, data, timeout=..., *, to=None, key=None, policy=None):
        """Send to one subscriber, and await its answer.

        A plain function: the message is on its way when it returns. Await what it returns for the
        answer, bytes. A request has exactly one outcome. Chooses as :meth:`notify` does.

        :param timeout: seconds, None for no deadline; by default the node's ``request_timeout``.
            The deadline travels with the message.
        :raises NoSubscriber, PeerLost, Overloaded, FrameError: at once, as :meth:`notify` does;
            the first three also when awaited.
        :raises RemoteError: (awaited) the handler raised.
        :raises DeadlineExceeded: (awaited) no answer in time; at once when ``timeout`` is not
            above zero.
        """
        cdef int number = channel_number(channel)
        if key is not None or policy is not None:
            to = self.chosen(number, to, key, policy)
        return self.send_request(number, data, timeout, to)

    def ventilator(self, channels, data):
        """Start a pipeline: the stages get the message one after the other, each calling ``next``.

        :param channels: the stages, in order; at least one.
        :raises NoSubscriber: nobody subscribes to the first stage.
        """
        cdef list numbers = [channel_number(channel) for channel in channels]
        if not numbers:
            raise ValueError("a pipeline has at least one channel")
        if len(numbers) > 16384:
            raise ValueError(f"a pipeline of {len(numbers)} channels: at most 16384 are allowed")
        self.send_stages(numbers, data)

    # Several messages at once: one crossing from Python instead of one a message.

    def notify_many(self, channel, messages, *, to=None):
        """:meth:`notify` for each of ``messages``, in order; how many that were.

        Raises as ``notify`` does, at the first that is refused; ``sent`` of the error is how many
        went before it.

        :param messages: an iterable of bytes-like.
        """
        cdef int number = channel_number(channel)
        cdef Py_ssize_t sent = 0
        try:
            for data in messages:
                self.send_notify(number, data, to, True)
                sent += 1
        except errors.DomiError as error:
            error.sent = sent
            raise
        return sent

    def call_many(self, channel, messages, reply_channel, *, to=None):
        """:meth:`call` for each of ``messages``, in order; how many that were.

        Raises as :meth:`notify_many` does.
        """
        cdef int number = channel_number(channel)
        cdef int reply = channel_number(reply_channel)
        cdef Py_ssize_t sent = 0
        try:
            for data in messages:
                self.send_call(number, data, reply, to, True)
                sent += 1
        except errors.DomiError as error:
            error.sent = sent
            raise
        return sent

    def publish_many(self, channel, messages, *, to=None):
        """:meth:`publish` for each of ``messages``, in order; the sum of what it returns.

        Raises as :meth:`notify_many` does.
        """
        cdef int number = channel_number(channel)
        cdef Py_ssize_t sent = 0, copies = 0
        try:
            for data in messages:
                copies += self.send_publish(number, data, to)
                sent += 1
        except errors.DomiError as error:
            error.sent = sent
            raise
        return copies

    def reply_many(self, contexts, answers):
        """``context.reply(answer)`` for each of ``contexts`` with the answer at its place.

        Raises as :meth:`Context.reply` does, at the first that is refused; ``sent`` of the error is
        how many were answered before it.

        :param answers: as many bytes-like as there are contexts, or one (bytes, bytearray or
            memoryview) for all.
        :returns: how many were answered.
        :raises ValueError: there are more contexts than answers, or fewer.
        """
        cdef Py_ssize_t sent = 0
        cdef list asked = list(contexts)
        cdef list given = None      # one for all
        if not isinstance(answers, (bytes, bytearray, memoryview)):
            given = list(answers)
            if len(asked) != len(given):
                raise ValueError(f"{len(given)} answers for {len(asked)} contexts")
        for item in asked:
            if type(item) is not Context:
                raise TypeError(f"{item!r} is not a Context")
        try:
            for item in asked:
                (<Context>item).reply_now(answers if given is None else given[sent])
                sent += 1
        except errors.DomiError as error:
            error.sent = sent
            raise
        return sent
