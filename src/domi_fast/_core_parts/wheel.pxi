# Timers: a hierarchical wheel (Varghese and Lauck, 1987), without I/O and without a clock.
#
# Eight levels of 64 slots; a slot of level n spans 64**n ticks. schedule and cancel are O(1): an
# entry is linked into the slot that its expiry selects and moves down a level each time the slot
# above comes due, at most seven times. A word of bits a level finds the next occupied slot.
# Invariant: an entry never fires before its expiry. Owned by the loop thread.

cdef enum:
    WHEEL_LEVELS = 8
    WHEEL_BITS = 6
    WHEEL_SLOTS = 64

cdef uint64_t WHEEL_TICKS = <uint64_t>1 << (WHEEL_LEVELS * WHEEL_BITS)

cdef extern from *:
    """
    static inline int domi_lowest_bit(uint64_t v) { return __builtin_ctzll(v); }
    """
    int lowest_bit "domi_lowest_bit"(uint64_t v) noexcept

cdef extern from *:
    """
    /* Whether calling it runs nothing of it: an async def or a generator. */
    static inline int domi_runs_later(PyObject *callback)
    {
        if (PyMethod_Check(callback))
            callback = PyMethod_GET_FUNCTION(callback);
        return PyFunction_Check(callback)
            && (((PyCodeObject *)PyFunction_GET_CODE(callback))->co_flags
                & (CO_COROUTINE | CO_GENERATOR | CO_ASYNC_GENERATOR));
    }
    """
    bint runs_later "domi_runs_later"(object callback) noexcept


cdef inline int check_callback(object callback) except -1:
    if not callable(callback):
        raise TypeError(f"callback {callback!r} is not callable")
    if runs_later(callback):
        raise TypeError(
            f"callback {callback!r} is an async def or a generator, which a timer would only make "
            "and not run: use def")
    return 0


cdef inline void unlink_node(TimerNode* node) noexcept:
    node.prev.next = node.next
    node.next.prev = node.prev
    node.next = NULL


cdef inline void link_before(TimerNode* head, TimerNode* node) noexcept:
    node.prev = head.prev
    node.next = head
    head.prev.next = node
    head.prev = node


cdef uint64_t wheel_time(TimeWheel wheel, double when) except? 0:
    # In nanoseconds. Beyond 64**8 ticks the wheel would take a time for one of an earlier round.
    cdef uint64_t ns
    if when == when and when <= 1e10:
        ns = <uint64_t>(max(when, 0.0) * 1e9 + 0.5)
        if wheel.ticks_at(ns) < WHEEL_TICKS - 1:
            return ns
    raise ValueError(
        f"{when} s: times up to "
        f"{min(1e10, (wheel.origin + <double>WHEEL_TICKS * wheel.resolution) * 1e-9):g} s are "
        "allowed")


@cython.final
cdef class TimeWheel:
    """Timers in O(1), on whatever clock it is advanced by.

    :param resolution: seconds a tick, 10 microseconds to 1 second. A timer fires at the first
        tick at or after its time: never early, at most one tick late.
    :param start: the time now, in seconds, on the clock that :meth:`advance` is given.
    """

    def __cinit__(self, double resolution=0.001, *, double start=0.0):
        cdef int i
        if not 0.00001 <= resolution <= 1.0:
            raise ValueError(f"resolution {resolution}: a tick lasts 0.00001 to 1 second")
        if not 0.0 <= start <= 1e9:
            raise ValueError(f"start {start}: a time in seconds, 0 to 1e9")
        self.slots = <TimerNode*>malloc(sizeof(TimerNode) * WHEEL_LEVELS * WHEEL_SLOTS)
        if self.slots is NULL:
            raise MemoryError
        for i in range(WHEEL_LEVELS * WHEEL_SLOTS):
            self.slots[i].next = &self.slots[i]
            self.slots[i].prev = &self.slots[i]
        self.due.next = &self.due
        self.due.prev = &self.due
        self.resolution = <uint64_t>(resolution * 1e9 + 0.5)
        self.origin = <uint64_t>(start * 1e9)
        self.last = self.origin

    def __dealloc__(self):
        if self.slots is not NULL:
            self.clear()
            free(self.slots)

    def __len__(self):
        return self.pending

    def call_at(self, double when, callback):
        """Have ``callback()`` called by the :meth:`advance` that reaches ``when`` (seconds).

        :raises ValueError: ``when`` is more than 1e10 seconds, or 2**48 ticks after the start.
        """
        return self.once(when, callback)

    cdef Timer once(self, double when, object callback):
        check_callback(callback)
        return self.start(wheel_time(self, when), callback, TIMER_ONCE)

    def every(self, double period, callback):
        """Have ``callback()`` called again and again, ``period`` seconds apart, until cancelled.

        The first beat is one period after the last :meth:`advance`. Beat n is due n periods after
        the start however late those before it were: the timer does not drift. A beat that is not
        called before the next one is due is left out; ``missed`` of the timer, while the callback
        runs, is how many were left out just before it. A callback that raises is called again.

        :param period: seconds, at least one tick.
        """
        return self.beat_from(self.last, period, callback)

    cdef Timer beat_from(self, uint64_t now_ns, double period, object callback):
        check_callback(callback)
        if not 0.0 < period <= 1e9 or <uint64_t>(period * 1e9 + 0.5) < self.resolution:
            raise ValueError(
                f"period {period} s: from {self.resolution * 1e-9:g} s, one tick, to 1e9 s is "
                "allowed")
        cdef Beat beat = Beat.__new__(Beat)
        beat.callback = callback
        beat.period = <uint64_t>(period * 1e9 + 0.5)
        beat.due = now_ns + beat.period
        wheel_time(self, <double>beat.due * 1e-9)
        return self.start(beat.due, beat, TIMER_PERIODIC)

    cdef int put_off(self, Timer timer, uint64_t when_ns) except -1:
        # Have a pending timer fire, or begin to beat, at another time.
        if timer.wheel is NULL:
            return 0
        self.remove(&timer.node)
        if timer.node.kind == TIMER_PERIODIC:
            (<Beat><object>timer.callback).due = when_ns
        self.add(&timer.node, self.ticks_at(when_ns))
        return 0

    cdef Timer start(self, uint64_t when_ns, object callback, uint16_t kind):
        cdef Timer timer = Timer.__new__(Timer)
        live(LIVE_TIMER, 1)
        Py_INCREF(callback)
        timer.callback = <PyObject*>callback
        timer.wheel = <PyObject*>self
        timer.node.kind = kind
        Py_INCREF(timer)
        self.add(&timer.node, self.ticks_at(when_ns))
        return timer

    def call_later(self, double delay, callback):
        """:meth:`call_at`, ``delay`` seconds after the time of the last :meth:`advance`."""
        return self.once(<double>self.last * 1e-9 + delay, callback)

    def clear(self):
        """Drop every pending timer without calling it."""
        cdef int i
        for i in range(WHEEL_LEVELS * WHEEL_SLOTS):
            abandon(self, &self.slots[i])
        abandon(self, &self.due)

    def next_deadline(self):
        """A time (seconds) at which :meth:`advance` is worth calling, or None when empty.

        Never later than the earliest timer.
        """
        cdef uint64_t when = self.next_ns()
        return None if when == NEVER else <double>when * 1e-9

    def advance(self, double now):
        """Fire what is due at ``now`` (seconds), tick by tick; the number fired. Of one tick, what
        was set first fires first.

        A time before the last one changes nothing. A callback that raises stops the round: the
        rest fires with the next call. What a callback schedules for the past fires at the
        following tick: with this call when ``now`` lies beyond it, otherwise with a later one.

        :raises ValueError: ``now`` is not a time that the wheel can count to.
        """
        return self.advance_within(wheel_time(self, now), NEVER)

    cdef uint64_t ticks_at(self, uint64_t when_ns) noexcept:
        # The first tick at or after the time.
        if when_ns <= self.origin:
            return 0
        return (when_ns - self.origin + self.resolution - 1) // self.resolution

    cdef void add(self, TimerNode* node, uint64_t expiry) noexcept:
        node.expiry = max(expiry, self.tick + 1)
        self.place(node)
        self.pending += 1

    cdef void place(self, TimerNode* node) noexcept:
        # The level is that of the highest digit (base 64) in which expiry and tick differ.
        cdef uint64_t differs = node.expiry ^ self.tick
        cdef int level = 0
        cdef int index
        while level < WHEEL_LEVELS - 1 and differs >> (WHEEL_BITS * (level + 1)):
            level += 1
        index = <int>((node.expiry >> (WHEEL_BITS * level)) & (WHEEL_SLOTS - 1))
        node.slot = <uint16_t>(level * WHEEL_SLOTS + index)
        self.occupied[level] |= <uint64_t>1 << index
        link_before(&self.slots[node.slot], node)

    cdef void remove(self, TimerNode* node) noexcept:
        cdef TimerNode* head
        if node.next is NULL:
            return
        unlink_node(node)
        self.pending -= 1
        if node.slot < WHEEL_LEVELS * WHEEL_SLOTS:
            head = &self.slots[node.slot]
            if head.next is head:
                self.occupied[node.slot >> WHEEL_BITS] &= ~(
                    <uint64_t>1 << (node.slot & (WHEEL_SLOTS - 1)))

    cdef void cascade(self, int level) noexcept:
        # The slot of this level that `tick` has just entered: its entries move down.
        cdef int index = <int>((self.tick >> (WHEEL_BITS * level)) & (WHEEL_SLOTS - 1))
        cdef TimerNode* head = &self.slots[level * WHEEL_SLOTS + index]
        cdef TimerNode* node
        self.occupied[level] &= ~(<uint64_t>1 << index)
        while head.next is not head:
            node = head.next
            unlink_node(node)
            self.place(node)

    cdef uint64_t next_tick(self) noexcept:
        # The next tick at which an entry fires or moves down; NEVER when there is none. Entries of
        # a level lie ahead of the tick within the level's present round.
        cdef int level, shift, index
        cdef uint64_t ahead
        for level in range(WHEEL_LEVELS):
            shift = WHEEL_BITS * level
            index = <int>((self.tick >> shift) & (WHEEL_SLOTS - 1))
            ahead = self.occupied[level] & ~((<uint64_t>2 << index) - 1)
            if ahead:
                return ((self.tick >> (shift + WHEEL_BITS) << WHEEL_BITS)
                        + <uint64_t>lowest_bit(ahead)) << shift
        return NEVER

    cdef uint64_t next_ns(self) noexcept:
        cdef uint64_t tick
        if self.due.next is not &self.due:
            return self.origin + self.tick * self.resolution
        tick = self.next_tick()
        return NEVER if tick == NEVER else self.origin + tick * self.resolution

    cdef int advance_within(self, uint64_t now_ns, uint64_t until_ns) except -1:
        # Up to `now_ns`, or until the monotonic clock shows `until_ns`: the rest stays due.
        cdef uint64_t target, next_stop
        cdef TimerNode* node
        cdef TimerNode* head
        cdef int level, fired = 0
        if self.advancing or now_ns < self.last:
            return 0
        self.last = now_ns
        target = (now_ns - self.origin) // self.resolution
        self.advancing = True
        try:
            fired = self.fire_due(0, until_ns)
            while self.tick < target and self.due.next is &self.due and not (
                    fired and is_past(until_ns)):
                next_stop = self.next_tick()
                if next_stop > target:
                    self.tick = target
                    break
                self.tick = next_stop
                level = 1
                while level < WHEEL_LEVELS and not (
                        self.tick & ((<uint64_t>1 << (WHEEL_BITS * level)) - 1)):
                    level += 1
                while level > 1:
                    level -= 1
                    self.cascade(level)
                head = &self.slots[self.tick & (WHEEL_SLOTS - 1)]
                self.occupied[0] &= ~(<uint64_t>1 << (self.tick & (WHEEL_SLOTS - 1)))
                if head.next is not head:
                    while head.next is not head:
                        node = head.next
                        unlink_node(node)
                        node.slot = 0xFFFF
                        link_before(&self.due, node)
                    fired = self.fire_due(fired, until_ns)
        finally:
            self.advancing = False
        return fired

    cdef int fire_due(self, int fired, uint64_t until_ns) except -1:
        cdef TimerNode* node
        while self.due.next is not &self.due:
            node = self.due.next
            unlink_node(node)
            self.pending -= 1
            fired += 1
            fire(node)
            if is_past(until_ns):
                break
        return fired


cdef inline bint is_past(uint64_t when) noexcept:
    return when != NEVER and monotonic_ns() > when


cdef inline PyObject* timer_at(TimerNode* node) noexcept:
    # The timer whose first field this is.
    return <PyObject*>(<char*>node - sizeof(PyObject))


cdef void abandon(TimeWheel wheel, TimerNode* head) noexcept:
    cdef TimerNode* node
    while head.next is not head:
        node = head.next
        wheel.remove(node)
        if node.kind <= TIMER_PERIODIC:
            forget(<Timer><object>timer_at(node))


cdef int fire(TimerNode* node) except -1:
    # The locals hold the owners: what fires may take the last other reference to them away.
    cdef Timer timer
    cdef Request request
    cdef Session session
    cdef object callback
    if node.kind == TIMER_REQUEST:
        request = <Request><object>(<OwnedNode*>node).owner
        request.expire()
    elif node.kind == TIMER_SESSION:
        session = <Session><object>(<OwnedNode*>node).owner
        beat(session)
    else:
        timer = <Timer><object>timer_at(node)
        if node.kind == TIMER_ONCE:
            callback = <object>timer.callback
            forget(timer)
        else:
            callback = next_beat(timer)
        check_made_nothing(callback, callback())
    return 0


cdef inline int check_made_nothing(object callback, object result) except -1:
    # What a callback returns is of no use, but a coroutine was to be run by somebody.
    if PyCoro_CheckExact(<PyObject*>result):
        result.close()
        raise TypeError(
            f"callback {callback!r} has returned a coroutine, which nobody will await: have it "
            "make a task")
    return 0


cdef object next_beat(Timer timer):
    # Back into the wheel for the first beat that is still to come; what the present one calls.
    cdef Beat beat = <Beat><object>timer.callback
    cdef TimeWheel wheel = <TimeWheel><object>timer.wheel
    beat.missed = (wheel.last - beat.due) // beat.period
    beat.due += (beat.missed + 1) * beat.period
    wheel.add(&timer.node, min(wheel.ticks_at(beat.due), WHEEL_TICKS - 1))
    return beat.callback


cdef void forget(Timer timer) noexcept:
    # Drops what the timer holds, and the wheel's reference to it.
    cdef PyObject* callback = timer.callback
    cdef PyObject* wheel = timer.wheel
    timer.callback = NULL
    timer.wheel = NULL
    if wheel is not NULL:
        live(LIVE_TIMER, -1)
        Py_XDECREF(callback)
        Py_DECREF(timer)


@cython.no_gc
@cython.final
cdef class Beat:
    # What a periodic timer has for a callback. Its timer is in a wheel, through which the collector
    # does not see either, or has let go of it.
    pass


@cython.no_gc
@cython.final
@cython.freelist(256)
cdef class Timer:
    """A pending call of a :class:`TimeWheel`."""

    def cancel(self):
        """Take the timer out; whether it was still pending. Also allowed in a callback."""
        if self.wheel is NULL:
            return False
        (<TimeWheel>self.wheel).remove(&self.node)
        forget(self)
        return True

    @property
    def active(self):
        """Whether it has neither fired for the last time nor been cancelled."""
        return self.wheel is not NULL

    @property
    def missed(self):
        """Beats of a periodic timer that were left out just before the latest; otherwise 0."""
        if self.wheel is NULL or self.node.kind != TIMER_PERIODIC:
            return 0
        return (<Beat><object>self.callback).missed
