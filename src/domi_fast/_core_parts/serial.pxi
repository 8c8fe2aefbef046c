# Serial mode: the frames of some channels wait in a ring, and one scheduler runs their handlers and
# its timers, one at a time, a tick after the other.
#
# A tick drains the ring until its budget is used up, and then fires due timers until theirs is: a
# full ring makes no timer later than that, and a storm of timers keeps the ring waiting no longer.
# Where the loop thread is at both ends of the ring, a message that finds it empty is not put in:
# it is run at once, or goes into its list, and the tick at the batch's end has the same budget.
# When that is used up, what follows goes into the ring, and the loop has its turn before the next
# tick.
# Invariants: a record owns a reference to what it names; a handler or timer runs only while the
# scheduler is `ticking`, and none within another; the loop thread alone puts into the ring; a
# context that a group has for what comes holds nothing, and nobody else has it. What runs the ticks
# is the serial thread: the loop thread here (LoopScheduler), one of its own in
# serial_thread.pxi.

cdef extern from *:
    """
    #include <sys/timerfd.h>

    /* A timer of the kernel's, on the monotonic clock: a loop's own may round to milliseconds. */
    static int domi_timer_new(void)
    { return timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC); }
    static int domi_timer_set(int fd, uint64_t when)
    {
        struct itimerspec time = {{0, 0}, {0, 0}};
        time.it_value.tv_sec = (time_t)(when / 1000000000u);
        time.it_value.tv_nsec = (long)(when % 1000000000u);
        return timerfd_settime(fd, TFD_TIMER_ABSTIME, &time, NULL);
    }
    """
    int timer_new "domi_timer_new"() noexcept
    int timer_set "domi_timer_set"(int fd, uint64_t when) noexcept

cdef extern from "unistd.h" nogil:
    Py_ssize_t c_read "read"(int fd, void* where, size_t size) noexcept


@cython.final
cdef class JoinContext:
    """One message of each channel of a join, in the order in which the channels were given.

    :ivar channels: the channels, a tuple of ints.
    :ivar requests: their messages, a tuple of :class:`Context`; each may be answered by itself.
    """

    def __repr__(self):
        return f"<JoinContext channels={self.channels}>"


@cython.final
cdef class SerialGroup:
    # Channels that were subscribed together. A join keeps a queue for each; a race keeps none.

    cdef int join(self, Router router, int place, Context context) except -1:
        # Queue the message, and run the handler once every queue has one.
        cdef JoinContext joined
        cdef list queues = self.queues
        queue = queues[place]
        if len(queue) >= self.max_pending:
            router.count("joins_overloaded")
            if context.is_owed():
                answer_failure(router, context, STATUS_OVERLOADED, text_of(
                    f"{self.max_pending} messages of channel {context.channel} wait for those "
                    "that they are to be joined with"))
            return 0
        if context.is_owed():
            context.expect_answer()
        queue.append(context)
        if len(queue) > 1:
            return 0
        self.missing -= 1
        if self.missing:
            return 0
        joined = JoinContext.__new__(JoinContext)
        joined.channels = self.channels
        try:
            joined.requests = tuple([queue.popleft() for queue in queues])
        except IndexError:
            return 0            # taken off by the loop thread, between two allocations
        for queue in queues:
            if not queue:
                self.missing += 1
        run_several(router, self.handler, joined, joined.requests, len(joined.requests),
                    self.channels[0])
        return 0

    cdef int add(self, Context context) except -1:
        # To the present list.
        if self.waiting < len(self.batch):
            self.batch[self.waiting] = context
        else:
            self.batch.append(context)
        self.waiting += 1
        self.asked |= context.kind == KIND_REQUEST
        return 0

    cdef list take_batch(self):
        # The present list; the next one is empty.
        cdef list following = []        # may run the collector, and so anything, before the rest
        cdef list contexts = self.batch
        self.batch = following
        if self.waiting < len(contexts):
            del contexts[self.waiting:]
        self.waiting = 0
        return contexts

    cdef int give_back(self, list contexts) except -1:
        # The handler has returned. Where it kept neither its list, which is in a variable of the
        # caller's, nor any of the contexts, the next list is shown in the same ones.
        cdef Py_ssize_t i
        cdef PyObject* item
        if Py_REFCNT(<PyObject*>contexts) != 1 or len(contexts) > BATCH_MOST:
            return 0
        for i in range(len(contexts)):
            item = PyList_GET_ITEM(contexts, i)
            if Py_REFCNT(item) != 1 or type(<object>item) is not Context:
                return 0
            # It holds nothing while it waits, neither a message nor a session.
            if (<Context>item).held:
                (<Context>item).let_go()
            (<Context>item).session = None
        if not self.batch:
            self.batch = contexts
        return 0


@cython.final
cdef class SerialChannel(Taker):
    # Hands the frames of its channel to the scheduler, by the ring or at once.

    cdef int accept(self, Session session, RawFrame* frame) except -1:
        cdef Scheduler scheduler = self.scheduler
        if scheduler.at_once and not scheduler.ticking and ring_is_empty(scheduler.ring):
            if self.handler is not None:
                return run_now(
                    <LoopScheduler>scheduler, <PyObject*>self.handler, session, frame)
            if self.group is not None:
                if self.group.batch is not None:
                    return list_now(<LoopScheduler>scheduler, self.group, session, frame)
                return (<LoopScheduler>scheduler).take_now(self, session, frame)
        return self.put_frame(session, frame)

    cdef int put_frame(self, Session session, RawFrame* frame) except -1:
        cdef Scheduler scheduler = self.scheduler
        if self.group is None or scheduler.state == SERIAL_CLOSED:
            scheduler.router.count("dropped_no_subscriber")
            return scheduler.router.reject(session, STATUS_NO_SUBSCRIBER, frame)
        if not scheduler.spilled and self.has_put(session, frame):
            return scheduler.awaken()
        return scheduler.overflow(self, session, frame)

    cdef bint has_put(self, Session session, RawFrame* frame) except -1:
        # Whether there was room.
        cdef Scheduler scheduler = self.scheduler
        cdef size_t size = <size_t>frame.size + frame.extend_size
        cdef Arrival arrival
        cdef Context context
        cdef uint8_t* payload
        if frame.owner is not NULL or size > scheduler.most or self.group.batch is not None:
            # Too large for the ring, or will be kept in a context of its own anyway.
            if not ring_may_own(scheduler.ring, size, scheduler.router.queue_limit):
                return False
            context = Context.__new__(Context)
            fill_context(context, session, frame, session.engine.now)
            return self.has_put_context(context, size)
        payload = ring_claim_alone(scheduler.ring, <uint32_t>(sizeof(Arrival) + size))
        if payload is NULL:
            return False
        Py_INCREF(session)
        Py_INCREF(self)
        arrival.parcel.origin = <PyObject*>session
        arrival.parcel.intake = <PyObject*>self
        arrival.time = session.engine.now
        arrival.size = frame.size
        arrival.channel = frame.channel
        arrival.extend_size = frame.extend_size
        copy(payload, &arrival, sizeof(Arrival))
        # Without an owner, the extend follows upon the data.
        copy(payload + sizeof(Arrival), frame.data, size)
        ring_publish_alone(
            scheduler.ring, payload, <uint32_t>(sizeof(Arrival) + size), RING_FRAME)
        return True

    cdef int run(self, Context context) except -1:
        cdef SerialGroup group      # which its handler may take off
        if self.handler is not None:
            self.scheduler.called = True
            return call_handler(self.scheduler.router, <PyObject*>self.handler, context, True)
        group = self.group
        if group is None:
            return self.scheduler.abandon([context])
        if group.queues is not None:
            self.scheduler.called = True
            return group.join(self.scheduler.router, self.place, context)
        if not group.listed:
            group.listed = True
            self.scheduler.batches.append(group)
        group.add(context)
        if group.waiting == BATCH_MOST:
            self.scheduler.called = True
            return self.scheduler.run_batch(group)
        return 0

    cdef bint has_put_context(self, Context context, size_t size) except -1:
        # Whether there was room: a message by reference.
        cdef Reference reference
        cdef uint8_t* payload = ring_claim_alone(self.scheduler.ring, sizeof(Reference))
        if payload is NULL:
            return False
        Py_INCREF(context)
        Py_INCREF(self)
        reference.parcel.origin = <PyObject*>context
        reference.parcel.intake = <PyObject*>self
        reference.size = size
        copy(payload, &reference, sizeof(Reference))
        ring_own(self.scheduler.ring, size)
        ring_publish_alone(self.scheduler.ring, payload, sizeof(Reference), RING_REFERENCE)
        return True


cdef inline Context shown_by(Scheduler scheduler):
    # The context that the next message is shown in.
    cdef Context context = scheduler.spare
    if context is None or context.held or not is_spare(context):
        context = scheduler.spare = Context.__new__(Context)
    return context


cdef inline int put_away(Scheduler scheduler, Context context, Session session) except -1:
    # Its handler has returned, and may have kept it.
    if scheduler.spare is context:
        if not is_spare(context) or session.state != SESSION_UP:
            scheduler.spare = None
        elif context.held:
            context.let_go()
    return 0


cdef class Scheduler:
    """Runs the handlers of its channels, and its timers, one at a time.

    :param ring_size: bytes, a power of two.
    :param tick: seconds: the resolution of the timers.
    :param max_pending: messages of a channel that may wait for those that they are joined with.
    :param drain_budget: seconds for the ring in each tick, before the timers' turn.
    :param timer_budget: seconds for the timers in each tick, before the ring's turn.
    :param busy_poll: seconds to look for more after the last message before sleeping.
    :param name: for people.
    """

    def __cinit__(self, Router router not None, ring_size, double tick, Py_ssize_t max_pending,
                  double drain_budget, double timer_budget, double busy_poll, str name not None):
        cdef uint64_t capacity = ring_capacity(ring_size)
        self.router = router
        self.max_pending = max_pending
        self.drain_ns = <uint64_t>(drain_budget * 1e9)
        self.timer_ns = <uint64_t>(timer_budget * 1e9)
        self.spin_ns = <uint64_t>(busy_poll * 1e9)
        self.name = name
        self.groups = []
        self.batches = []
        self.wheel = TimeWheel(tick)
        self.wheel.origin = self.wheel.last = monotonic_ns()
        self.intakes = {}
        self.early = []
        self.ring_bytes = capacity
        self.ring = ring_new(capacity)
        if self.ring is NULL:
            raise MemoryError
        live(LIVE_RING, 1)
        self.most = min(<uint64_t>RING_BY_REFERENCE, ring_most(self.ring)) - sizeof(Arrival)

    def __dealloc__(self):
        if self.ring is not NULL:
            while self.drop_record():
                pass
            ring_free(self.ring)
            live(LIVE_RING, -1)

    # ----------------------------------------------------------------- what the two kinds differ in

    def stop_taking(self):
        """Take the channels off the node; what the ring holds is still run.

        :returns: a future that is done when everything has run; None when it has.
        """
        raise NotImplementedError

    cdef int check_caller(self) except -1:
        # Raises unless this thread may change subscriptions and timers.
        raise NotImplementedError

    cdef int on_loop(self, object function, tuple arguments) except -1:
        # Have the loop thread call it; where the caller is that thread, now.
        raise NotImplementedError

    cdef int arm(self) except -1:
        # Have a tick run when the wheel's next timer is due.
        raise NotImplementedError

    cdef int overflow(self, SerialChannel intake, Session session, RawFrame* frame) except -1:
        # The ring has no room for the frame, or others wait for some.
        raise NotImplementedError

    cdef int drain_spill(self, uint64_t until) except -1:
        # The ring is empty: what was taken while it was full has its turn.
        return 0

    cdef int open(self) except -1:
        # On the loop thread, when it starts: what the ticks need.
        raise NotImplementedError

    cdef int close(self) except -1:
        # On the loop thread, when the ticks are over: that goes, and what end() lets go of.
        raise NotImplementedError

    cdef int abandon(self, list contexts) except -1:
        # Refuse what nobody will take any more.
        return self.on_loop(self.router.abandon, (contexts,))

    # ------------------------------------------------------------------------------- subscriptions

    def subscribe(self, channel, handler=..., *, bint batch=False):
        """Have ``handler(context)`` called for every message on ``channel``, in its turn.

        :param channel: 50-65499, or a member of ``LibraryChannel`` that the core does not serve.
        :param handler: a ``def``. Without it, this is a decorator.
        :param batch: call ``handler(contexts)`` with a list instead, of what has come by the end of
            the ring's turn in a tick, at most 256 at a time.
        :raises DomiError: the channel has a handler already, here or at the node.
        """
        if handler is ...:
            return lambda function: self.subscribe(channel, function, batch=batch) or function
        self.add_group((channel,), handler, False, batch)

    def subscribe_race(self, channels, handler=...):
        """Have ``handler(context)`` called for every message on any of ``channels``.

        Before the start only. The channels can be taken off together with ``unsubscribe_group``.

        :raises DomiError: it has started, or a channel has a handler already.
        """
        if handler is ...:
            return lambda function: self.subscribe_race(channels, function) or function
        self.check_new("subscribe_race")
        self.add_group(channels_of(channels), handler, False, False)

    def subscribe_all(self, channels, handler=...):
        """Have ``handler(joined)`` called whenever each of ``channels`` has a message.

        Each channel queues, first in, first out. The handler gets one message of each, in the order
        of ``channels``, as a :class:`JoinContext`. When ``max_pending`` messages of a channel wait,
        its newest is refused and counted (``joins_overloaded``), and a request gets Overloaded.
        Before the start only.

        :raises DomiError: it has started, or a channel has a handler already.
        """
        if handler is ...:
            return lambda function: self.subscribe_all(channels, function) or function
        self.check_new("subscribe_all")
        if isinstance(channels, (set, frozenset)):
            raise TypeError(
                f"channels {channels!r}: a set has no order, in which the handler gets the "
                "messages: use a list or a tuple")
        self.add_group(channels_of(channels), handler, True, False)

    cdef int check_new(self, str verb) except -1:
        if self.state == SERIAL_RUNNING:
            raise errors.DomiError(
                f"{verb}() after the start: subscribe races and joins before start()")
        return self.check_not_closed()

    cdef int check_not_closed(self) except -1:
        if self.state >= SERIAL_CLOSING:
            raise errors.DomiError("this serial is closed: make another one")
        return 0

    cdef int add_group(self, tuple channels, object handler, bint all_of_them,
                       bint batch) except -1:
        cdef SerialGroup group
        cdef SerialChannel intake
        cdef list numbers = [check_channel(channel) for channel in channels]
        self.check_not_closed()
        self.check_caller()
        if not numbers:
            raise ValueError("no channels: at least one is wanted")
        if len(set(numbers)) < len(numbers):
            raise ValueError(f"channels {numbers}: one of them is there twice")
        check_plain_handler(handler, "one handler at a time means that each runs to its end")
        for number in numbers:
            if number in self.intakes or (
                    self.router.channels[<int>number].handler is not NULL
                    and not self.is_leaving(number)):
                raise is_taken(self.router, number, self.intakes.get(number))
        group = SerialGroup.__new__(SerialGroup)
        group.channels = tuple(numbers)
        group.handler = handler
        group.max_pending = self.max_pending
        group.missing = len(numbers)
        group.queues = [deque() for _ in numbers] if all_of_them else None
        group.batch = [] if batch else None
        for place, number in enumerate(numbers):
            intake = SerialChannel.__new__(SerialChannel)
            intake.scheduler = self
            intake.group = group
            if not (all_of_them or batch):
                intake.handler = handler
            intake.channel = number
            intake.place = place
            self.intakes[number] = intake
        self.groups.append(group)
        if self.state == SERIAL_RUNNING:
            self.on_loop(self.install, (group,))
        return 0

    cdef bint is_leaving(self, int number) except -1:
        # Whether an intake stands in the node's table still that was unsubscribed here.
        cdef PyObject* handler = self.router.channels[number].handler
        return handler is not NULL and type(<object>handler) is SerialChannel and (
            (<SerialChannel><object>handler).scheduler is self
            and (<SerialChannel><object>handler).group is None)

    def install(self, SerialGroup group not None):
        """Put all of the group's channels, or none, into the node's table. On the loop thread."""
        cdef list done = []
        if self.state != SERIAL_RUNNING or group not in self.groups:
            self.remove_group(group)
            return              # closed, or taken off, since a serial thread asked for it
        try:
            for number in group.channels:
                if self.is_leaving(number):
                    self.router.uninstall(number)
                self.router.install(number, self.intakes[number])
                done.append(number)
        except BaseException:
            for number in done:
                self.router.uninstall(number)
            self.remove_group(group)
            raise

    def unsubscribe(self, channel):
        """Take the handler off a channel that was subscribed by itself.

        What waits in the ring for it is refused and counted.

        :raises DomiError: the channel has no handler here, or is one of a group's.
        """
        self.unsubscribe_group((channel,))

    def unsubscribe_group(self, channels):
        """Take off a race or a join; also while it runs, and from a handler.

        What waits for it, in the ring or for a join, is refused and counted as if nobody
        subscribed.

        :param channels: all the channels that were subscribed together, in any order.
        :raises DomiError: they were not subscribed together here.
        """
        cdef SerialGroup group = None
        cdef list numbers = [check_channel(channel) for channel in channels_of(channels)]
        self.check_caller()
        if not numbers:
            raise ValueError("no channels: at least one is wanted")
        for candidate in self.groups:
            if set((<SerialGroup>candidate).channels) == set(numbers):
                group = candidate
        if group is None:
            for number in numbers:
                if number in self.intakes:
                    others = (<SerialChannel>self.intakes[number]).group.channels
                    raise errors.DomiError(
                        f"channels {numbers} are not those of a group: channel {number} was "
                        f"subscribed with {list(others)}, which go together", channel=number)
            raise errors.DomiError(
                f"channels {numbers} have no handler here", channel=numbers[0])
        intakes = [self.intakes[number] for number in group.channels]
        self.remove_group(group)
        if self.state != SERIAL_NEW:
            self.on_loop(self.uninstall, (intakes,))

    def uninstall(self, intakes):
        """Take what stands in the node's table off it. On the loop thread.

        After the node's stop none does; and what hears of a loss meanwhile may be quicker.
        """
        cdef SerialChannel intake
        for intake in intakes:
            if self.router.channels[intake.channel].handler is <PyObject*>intake:
                self.router.uninstall(intake.channel)

    cdef int remove_group(self, SerialGroup group) except -1:
        cdef SerialChannel intake
        if group not in self.groups:
            return 0            # what the node calls when it takes a channel off has been quicker
        self.groups.remove(group)
        for number in group.channels:
            intake = self.intakes.pop(number)
            intake.group = None
            intake.handler = None
        if group.queues is not None:
            for queue in group.queues:
                self.abandon(list(queue))
                queue.clear()
        if group.listed:
            group.listed = False
            self.batches.remove(group)
        if group.waiting:
            self.abandon(group.take_batch())
        return 0

    # ------------------------------------------------------------------------------------ the life

    def start(self):
        """Begin, on the loop of the node, which has started."""
        if self.state == SERIAL_RUNNING:
            raise errors.DomiError("this serial has started before")
        cdef Timer timer
        cdef uint64_t now
        self.check_not_closed()
        self.router.require_engine()
        if asyncio.get_running_loop() is not self.router.engine.loop:
            raise errors.DomiError("started on another event loop than its node")
        self.engine = self.router.engine
        self.state = SERIAL_RUNNING
        now = monotonic_ns()
        early, self.early = self.early, []
        for timer, delay in early:
            self.wheel.put_off(timer, now + <uint64_t>delay)
        try:
            for group in list(self.groups):
                self.install(group)
            self.open()
        except BaseException:
            self.take_no_more()
            self.close()
            raise

    def finish(self):
        """End, when what stop_taking() gave is done: no timer fires any more, and what still waits
        for a join is refused."""
        self.close()

    cdef int take_no_more(self) except -1:
        # The channels leave the node; what the ring holds is still run.
        if self.engine is not None:
            self.engine.check_thread()
        if self.state == SERIAL_RUNNING:
            self.state = SERIAL_CLOSING
            self.uninstall(list(self.intakes.values()))
        return 0

    cdef int end(self) except -1:
        # No timer fires any more, and what still waits for a join is refused. On the serial thread.
        self.state = SERIAL_CLOSED
        while self.drop_record():
            pass
        for group in list(self.groups):
            self.remove_group(group)
        self.wheel.clear()
        self.spare = None
        return 0

    def handlers(self):
        """What is subscribed here, as ``{channel: handler}``."""
        return {channel: (<SerialGroup>group).handler
                for group in self.groups for channel in (<SerialGroup>group).channels}

    @property
    def backlog(self):
        """Messages that wait in the ring."""
        return ring_count(self.ring)

    @property
    def waiting(self):
        """Messages that wait for those that they are to be joined with."""
        return sum([len(queue) for group in self.groups
                    if (<SerialGroup>group).queues is not None
                    for queue in (<SerialGroup>group).queues])

    # ------------------------------------------------------------------------------------- timers

    def call_later(self, double delay, callback):
        """Call ``callback()`` in its turn, in ``delay`` seconds; a :class:`Timer`.

        Before the start, ``delay`` seconds after it.
        """
        cdef uint64_t now = monotonic_ns()
        self.check_timers()
        if not delay <= 1e9:
            raise ValueError(f"delay {delay} s: up to 1e9 s is allowed")
        return self.begun_timer(
            self.wheel.once(<double>now * 1e-9 + max(0.0, delay), callback), max(0.0, delay))

    def every(self, double period, callback):
        """Call ``callback()`` in its turn, each ``period`` seconds, as :meth:`TimeWheel.every`.

        The first beat is one period from now; before the start, one period after it.
        """
        self.check_timers()
        return self.begun_timer(self.wheel.beat_from(monotonic_ns(), period, callback), period)

    cdef Timer begun_timer(self, Timer timer, double delay):
        if self.state == SERIAL_NEW:
            self.early.append((timer, <uint64_t>(delay * 1e9 + 0.5)))
        self.arm()
        return timer

    cdef int check_timers(self) except -1:
        if self.state == SERIAL_CLOSED:
            raise errors.DomiError("this serial is closed: it has no timers any more")
        return self.check_caller()

    # ------------------------------------------------------------------------------------ the tick

    cdef int awaken(self) except -1:
        # Something was put into the ring, within a batch: it is run before the batch ends.
        if not self.ready:
            self.ready = True
            self.engine.ready.append(self)
        return 0

    cdef int run_tick(self, uint64_t until) except -1:
        # The ring's turn lasts until then. What ends the loop passes through, after a handler or a
        # timer has raised it.
        self.ticking = True
        try:
            self.drain(until)
            self.run_batches(until)
            self.now = monotonic_ns()
            while self.wheel.next_ns() <= self.now and self.fire_timers(self.now):
                pass
        finally:
            self.ticking = False
        return 0

    cdef bint fire_timers(self, uint64_t now) except -1:
        # Whether one of them raised, so that others may still be due and have time.
        try:
            self.wheel.advance_within(now, now + self.timer_ns)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:
            self.router.count("timer_errors")
            log.error("a timer failed", exc_info=error)
            return monotonic_ns() < now + self.timer_ns
        return False

    cdef int drain(self, uint64_t until) except -1:
        cdef uint32_t size
        cdef int kind
        cdef int left = CLOCK_EVERY
        cdef uint8_t* payload = ring_peek(self.ring, &size, &kind)
        self.called = False
        while payload is not NULL:
            self.run_arrival(payload, size, kind)
            # What only goes into a list takes no time to speak of.
            left -= 1
            if self.called or left == 0:
                if self.state == SERIAL_CLOSED or (
                        moment_passed(&self.moment) and monotonic_ns() > until):
                    return 0
                self.called = False
                left = CLOCK_EVERY
            payload = ring_peek(self.ring, &size, &kind)
        return self.drain_spill(until) if self.spilled else 0

    cdef int run_batches(self, uint64_t until) except -1:
        cdef SerialGroup group
        if self.begun and self.batches and monotonic_ns() > until:
            return 0
        while self.batches:
            group = self.batches.pop(0)
            group.listed = False
            self.run_batch(group)
            if monotonic_ns() > until:
                break
        return 0

    cdef int run_batch(self, SerialGroup group) except -1:
        cdef list contexts = group.take_batch()
        cdef bint asked = group.asked
        group.asked = False
        if not contexts:
            return 0
        run_list(self.router, group.handler, contexts, asked)
        # Elsewhere each comes in a context of its own.
        return group.give_back(contexts) if self.at_once else 0

    cdef bint has_work(self) noexcept:
        return not ring_is_empty(self.ring) or len(self.batches) > 0

    cdef int run_arrival(self, uint8_t* payload, uint32_t size, int kind) except -1:
        cdef Reference reference
        cdef Arrival arrival
        cdef RawFrame frame
        cdef Context context
        cdef SerialChannel intake
        cdef Session session
        if kind == RING_REFERENCE:
            copy(&reference, payload, sizeof(Reference))
            ring_consume(self.ring, payload, size)
            ring_disown(self.ring, reference.size)
            intake = <SerialChannel><object>reference.parcel.intake
            Py_DECREF(intake)           # the record's
            context = <Context><object>reference.parcel.origin
            Py_DECREF(context)          # the record's
            return intake.run(context)
        context = shown_by(self)
        copy(&arrival, payload, sizeof(Arrival))
        intake = <SerialChannel><object>arrival.parcel.intake
        Py_DECREF(intake)               # the record's
        session = <Session><object>arrival.parcel.origin
        Py_DECREF(session)              # the record's
        frame.channel = arrival.channel
        frame.size = arrival.size
        frame.extend_size = arrival.extend_size
        frame.data = payload + sizeof(Arrival)
        frame.extend = frame.data + arrival.size
        frame.owner = NULL
        try:
            fill_context(context, session, &frame, arrival.time)
        finally:
            ring_consume(self.ring, payload, size)
        intake.run(context)
        return put_away(self, context, session)

    cdef int refuse(self, Session session, RawFrame* frame) except -1:
        # The ring is full: the sender hears of it.
        self.router.count("ring_full")
        return self.router.reject(session, STATUS_OVERLOADED, frame)

    cdef bint drop_record(self) noexcept:
        # Whether there was one; the references that it owns go.
        cdef Parcel parcel              # of both kinds, the first field
        cdef uint32_t size
        cdef int kind
        cdef uint8_t* payload = ring_peek(self.ring, &size, &kind)
        if payload is NULL:
            return False
        copy(&parcel, payload, sizeof(Parcel))
        ring_consume(self.ring, payload, size)
        Py_DECREF(<object>parcel.origin)
        Py_DECREF(<object>parcel.intake)
        return True


cdef inline int run_now(LoopScheduler scheduler, PyObject* handler, Session session,
                        RawFrame* frame) except -1:
    # A message that has found the ring empty: what takes each by itself is called.
    cdef Context context = shown_by(scheduler)
    if not scheduler.ready:
        scheduler.awaken()
    fill_context(context, session, frame, session.engine.now)
    scheduler.ticking = True
    try:
        call_handler(scheduler.router, handler, context, True)
    finally:
        scheduler.ticking = False
    put_away(scheduler, context, session)
    return handler_called(scheduler)


cdef inline int list_now(LoopScheduler scheduler, SerialGroup group, Session session,
                         RawFrame* frame) except -1:
    # As run_now(), for what goes into a list.
    cdef Context context
    if not scheduler.ready:
        scheduler.awaken()
    if group.waiting < len(group.batch):
        context = <Context>PyList_GET_ITEM(group.batch, group.waiting)
        if context.held:
            context.let_go()        # there was no memory for what it was to show
    else:
        context = Context.__new__(Context)
        group.batch.append(context)
    fill_context(context, session, frame, session.engine.now)
    group.waiting += 1
    group.asked |= context.kind == KIND_REQUEST
    if not group.listed:
        group.listed = True
        scheduler.batches.append(group)
    if group.waiting < BATCH_MOST:
        return 0
    scheduler.ticking = True
    try:
        scheduler.run_batch(group)
    finally:
        scheduler.ticking = False
    return handler_called(scheduler)


cdef inline int handler_called(LoopScheduler scheduler) except -1:
    # Before the batch's end, and its tick.
    scheduler.begun = True
    if moment_passed(&scheduler.moment) and monotonic_ns() > scheduler.until:
        scheduler.take_turn()
        scheduler.resume_soon()
    return 0


@cython.final
cdef class LoopScheduler(Scheduler):
    """The serial thread is the loop thread: a tick is part of the batch that brought the messages.

    A message's tick comes before the batch ends; what it has no time for, and timers, have ticks of
    their own.
    """

    def __cinit__(self):
        self.timer_fd = -1
        self.armed = NEVER
        self.at_once = True

    def __dealloc__(self):
        if self.timer_fd >= 0:
            c_close(self.timer_fd)

    cdef int check_caller(self) except -1:
        return 0 if self.engine is None else self.engine.check_thread()

    cdef int on_loop(self, object function, tuple arguments) except -1:
        function(*arguments)
        return 0

    cdef int open(self) except -1:
        self.timer_fd = timer_new()
        if self.timer_fd < 0:
            raise OSError(errno, os.strerror(errno))
        self.engine.loop.add_reader(self.timer_fd, self.on_timer)
        self.spins = self.engine.start_polling(self.spin_ns)
        return self.arm()

    def stop_taking(self):
        self.take_no_more()
        if self.state != SERIAL_CLOSING or not self.has_work():
            return None
        self.emptied = self.engine.loop.create_future()
        return self.emptied

    cdef int close(self) except -1:
        cdef int fd = self.timer_fd
        self.at_once = False
        self.end()
        self.timer_fd = -1
        if fd >= 0:
            if self.spins:
                self.engine.stop_polling(self.spin_ns)
            if not self.engine.loop.is_closed():
                self.engine.loop.remove_reader(fd)
            c_close(fd)
        return 0

    cdef int arm(self) except -1:
        # The kernel's timer, for whatever the wheel has next.
        cdef uint64_t when
        if self.timer_fd < 0:
            return 0
        when = self.wheel.next_ns()
        if when < self.armed:
            self.armed = when
            if timer_set(self.timer_fd, max(when, <uint64_t>1)) < 0:
                raise OSError(errno, os.strerror(errno))
        return 0

    def on_timer(self):
        """The kernel's timer has expired."""
        cdef uint64_t expired
        if self.timer_fd >= 0 and c_read(self.timer_fd, &expired, sizeof(expired)) > 0:
            self.armed = NEVER
            self.resume()

    def resume(self):
        """A tick of its own, for what the last one had no time for."""
        self.resuming = False
        if self.state == SERIAL_CLOSED:
            return
        self.at_once = True
        self.engine.refresh()
        self.engine.enter()
        try:
            self.awaken()
        finally:
            self.engine.leave()

    cdef int awaken(self) except -1:
        if not self.ready:
            self.begun = False
            self.until = monotonic_ns() + self.drain_ns
        return Scheduler.awaken(self)

    cdef int take_now(self, SerialChannel intake, Session session, RawFrame* frame) except -1:
        # As run_now(), for a join.
        cdef Context context = Context.__new__(Context)
        self.awaken()
        fill_context(context, session, frame, session.engine.now)
        self.called = False
        self.ticking = True
        try:
            intake.run(context)
        finally:
            self.ticking = False
        return handler_called(self) if self.called else 0

    cdef int overflow(self, SerialChannel intake, Session session, RawFrame* frame) except -1:
        # The thread that puts is the one that takes: what is full has turns at once until there is
        # room, and the peers' messages wait in their sockets. Each takes a record out, at least.
        if self.ticking:
            return self.refuse(session, frame)
        while not ring_is_empty(self.ring):
            self.until = monotonic_ns() + self.drain_ns
            self.take_turn()
            if session.state == SESSION_CLOSED:
                return 0    # handlers have run, and the frame may be gone with its session
            if intake.group is None or self.state == SERIAL_CLOSED:
                return intake.put_frame(session, frame)
            if intake.has_put(session, frame):
                return self.awaken()
        return self.refuse(session, frame)

    cdef int tick(self) except -1:
        self.ready = False
        # Where it is resumed, its budget is used up: the loop has its turn first.
        return 0 if self.resuming else self.take_turn()

    cdef int take_turn(self) except -1:
        if self.ticking or self.state == SERIAL_CLOSED:
            return 0
        try:
            self.run_tick(self.until)
        finally:
            if self.state != SERIAL_CLOSED:
                self.after_tick()
        return 0

    cdef int resume_soon(self) except -1:
        if not self.resuming and self.state != SERIAL_CLOSED:
            self.resuming = True
            self.at_once = False
            self.engine.call_soon(self.resume)
        return 0

    cdef int after_tick(self) except -1:
        # See to it that there is another when something is left, and tell who waits for nothing.
        if self.has_work() or self.wheel.next_ns() <= self.now:
            self.resume_soon()
        else:
            self.arm()
            # The loop thread puts and takes: the ring's beginning is in a cache still.
            ring_rewind(self.ring)
        if self.emptied is not None and not self.has_work():
            emptied, self.emptied = self.emptied, None
            if not emptied.done():
                emptied.set_result(None)
        return 0


cdef tuple channels_of(object channels):
    try:
        return tuple(channels)
    except TypeError:
        raise TypeError(f"channels {channels!r}: a sequence of channels is wanted") from None


cdef object is_taken(Router router, int number, SerialChannel intake):
    # That a channel has a handler, and what takes it off: an exception.
    cdef object handler = intake
    cdef str off = f"unsubscribe({number})"
    if handler is None and router.channels[number].handler is not NULL:
        handler = <object>router.channels[number].handler
    if type(handler) is SerialChannel:
        intake = <SerialChannel>handler
        if intake.group is not None and len(intake.group.channels) > 1:
            off = f"unsubscribe_group({list(intake.group.channels)})"
        off = f"{off} of its Serial"
    return errors.DomiError(
        f"channel {number} has a handler already: {off} first", channel=number)
