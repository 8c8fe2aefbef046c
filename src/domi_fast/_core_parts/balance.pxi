# Which of several gets a message: the policies, and what they know of those that they choose from.
#
# Pure: nothing here sends. Invariants: a policy is asked to choose among one at least, and the
# compiled ones run no Python code while they do, so that what they choose from stays as it is. An
# object that stands at two channels has one state for both; of a name each channel has its own.
# Owned by the thread that chooses.

cdef enum:
    MEMORY_STEP = 10                # thousandths by which a share changes before the peers are told

cdef double EWMA_SPAN = 10e9        # ns in which what was seen of a latency loses two thirds
cdef double MEMORY_FULL = 0.9       # the share of its memory from which on a node gets no more


cdef inline bint is_full(int used) noexcept:
    # So many thousandths of a memory.
    return used * 0.001 > MEMORY_FULL


cdef inline uint64_t mixed(uint64_t x) noexcept:
    # SplitMix64's finaliser (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators,
    # 2014): every bit of the result depends on every bit of the argument.
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ULL
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBULL
    return x ^ (x >> 31)


cdef bint is_number(object value) except -1:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


cdef bytes key_bytes(object key):
    if isinstance(key, bytes):
        return key
    if isinstance(key, str):
        return (<str>key).encode()
    if isinstance(key, int) and not isinstance(key, bool):
        return b"%d" % key
    if isinstance(key, (bytearray, memoryview)):
        return bytes(key)
    raise TypeError(f"key {key!r}: a str, bytes or an int is wanted")


cdef uint64_t hash_of(bytes data) noexcept:
    # FNV-1a, mixed: the same in every process, as Python's own hash is not.
    cdef uint64_t value = 0xCBF29CE484222325ULL
    cdef const uint8_t* p = <const uint8_t*>PyBytes_AS_STRING(data)
    cdef Py_ssize_t i
    for i in range(PyBytes_GET_SIZE(data)):
        value = (value ^ p[i]) * 0x100000001B3ULL
    return mixed(value)


@cython.final
cdef class Candidate:
    """One of those that a policy chooses from, and what is known of it.

    :ivar id: what it goes by: a node's machine id, or a str of an instance that is no node.
    :ivar outstanding: what it was given and has not answered yet.
    :ivar memory: the share of its memory that is used, 0-1; below 0 until it has said.
    """

    def __init__(self, id, *, weight=1.0):
        self.id = id
        self.weight = weight
        self.memory = -1.0
        self.seed = hash_of(key_bytes(id))

    @property
    def weight(self):
        """How much it is to get beside the others, for the weighted policies; above 0."""
        return self.share

    @weight.setter
    def weight(self, weight):
        if not is_number(weight) or not 0.0 < weight < INFINITY:
            raise ValueError(f"weight {weight!r}: a number above 0 is wanted")
        self.share = weight

    @property
    def latency(self):
        """Seconds in which it answers; 0 while it has answered nothing.

        A slower answer counts at once, a faster one by and by.
        """
        return self.latency_ns * 1e-9

    def observe(self, latency):
        """It took ``latency`` seconds to answer, just now."""
        if not is_number(latency) or not 0.0 <= latency < INFINITY:
            raise ValueError(f"latency {latency!r}: seconds, 0 or more, are wanted")
        self.answered_in(latency * 1e9, monotonic_ns())

    cdef int answered_in(self, double latency, uint64_t now) except -1:
        # In nanoseconds.
        cdef double left
        if latency >= self.latency_ns:
            self.latency_ns = latency
        else:
            left = exp(-<double>(now - min(now, self.seen)) / EWMA_SPAN)
            self.latency_ns = self.latency_ns * left + latency * (1.0 - left)
        self.seen = now
        return 0

    cdef double cost(self, uint64_t now) noexcept:
        # What the next one would wait, by what is known. Who has not been tried costs nothing until
        # it has something to answer, and a bad experience fades: it is tried again.
        cdef double faded
        if self.seen == 0:
            return <double>self.outstanding * 1e9
        faded = self.latency_ns * exp(-<double>(now - min(now, self.seen)) / EWMA_SPAN)
        return faded * <double>(self.outstanding + 1)

    def __repr__(self):
        return (f"<Candidate {self.id!r} weight={self.share:g} outstanding={self.outstanding} "
                f"latency={self.latency:.6f} memory={self.memory:.2f}>")


cdef class CorePolicy:
    """A policy of the core's own."""

    cdef Py_ssize_t index(self, PyObject** some, Py_ssize_t count, bytes key) except -1:
        # Of the one that is chosen; `some` are Candidates, borrowed.
        raise NotImplementedError

    def choose(self, candidates, key=None):
        """One of ``candidates``.

        :param candidates: a sequence of :class:`Candidate`, one at least.
        :param key: for policies that go by one: a str, bytes or an int.
        :raises ValueError: there are no candidates; the policy goes by a key, and none was given.
        :raises Overloaded: none of them may be given anything.
        """
        cdef tuple some = tuple(candidates)
        cdef Py_ssize_t count = len(some)
        cdef PyObject** pointers
        if not count:
            raise ValueError("there are no candidates to choose from")
        for candidate in some:
            if not isinstance(candidate, Candidate):
                raise TypeError(f"{candidate!r} is not a Candidate")
        pointers = <PyObject**>malloc(count * sizeof(PyObject*))
        if pointers is NULL:
            raise MemoryError
        try:
            for i in range(count):
                pointers[i] = <PyObject*>some[i]
            return some[self.index(pointers, count, None if key is None else key_bytes(key))]
        finally:
            free(pointers)

    def __repr__(self):
        return f"<{type(self).__name__}>"


cdef inline Candidate candidate_at(PyObject** some, Py_ssize_t i):
    return <Candidate><object>some[i]


@cython.final
cdef class RoundRobin(CorePolicy):
    """Each in its turn."""

    cdef Py_ssize_t index(self, PyObject** some, Py_ssize_t count, bytes key) except -1:
        self.turn += 1
        return <Py_ssize_t>((self.turn - 1) % <uint64_t>count)


@cython.final
cdef class WeightedRoundRobin(CorePolicy):
    """Each as often as its weight says, spread evenly (nginx's smooth weighted round robin)."""

    def __cinit__(self):
        self.credit = {}

    cdef Py_ssize_t index(self, PyObject** some, Py_ssize_t count, bytes key) except -1:
        # Each gains its weight, and who has most is chosen and pays what all have gained.
        cdef Py_ssize_t i, best = 0
        cdef double have, most = -INFINITY, total = 0.0
        cdef Candidate candidate
        if len(self.credit) > 2 * count + 16:
            self.credit.clear()         # most of it is of those that have left
        for i in range(count):
            candidate = candidate_at(some, i)
            have = <double>self.credit.get(candidate.id, 0.0) + candidate.share
            self.credit[candidate.id] = have
            total += candidate.share
            if have > most:
                most = have
                best = i
        self.credit[candidate_at(some, best).id] = most - total
        return best


cdef class RandomPolicy(CorePolicy):
    """One that throws dice.

    :param seed: an int, for the same choices each time; otherwise they are different in each
        process.
    """

    def __init__(self, seed=None):
        self.state = (int.from_bytes(os.urandom(8), "little") if seed is None
                      else mixed(<uint64_t>(int(seed) & 0xFFFFFFFFFFFFFFFF)))

    cdef uint64_t bits(self) noexcept:
        # SplitMix64.
        self.state += 0x9E3779B97F4A7C15ULL
        return mixed(self.state)

    cdef Py_ssize_t below(self, Py_ssize_t count) noexcept:
        # Lemire's multiplication; a count is far below 2**32, and so is the bias.
        return <Py_ssize_t>(((self.bits() >> 32) * <uint64_t>count) >> 32)


@cython.final
cdef class Random(RandomPolicy):
    """Any of them, each as likely as the other."""

    cdef Py_ssize_t index(self, PyObject** some, Py_ssize_t count, bytes key) except -1:
        return self.below(count)


@cython.final
cdef class WeightedRandom(RandomPolicy):
    """Any of them, as likely as its weight says."""

    cdef Py_ssize_t index(self, PyObject** some, Py_ssize_t count, bytes key) except -1:
        cdef Py_ssize_t i
        cdef double total = 0.0, point
        for i in range(count):
            total += candidate_at(some, i).share
        point = <double>(self.bits() >> 11) * 2.0 ** -53 * total
        for i in range(count - 1):
            point -= candidate_at(some, i).share
            if point < 0.0:
                return i
        return count - 1


cdef object key_is_missing():
    return ValueError("the policy goes by a key: give key=")


@cython.final
cdef class KeyHash(CorePolicy):
    """The same one for the same key, in every process, as long as it is there.

    When one of n leaves, only its own keys move (rendezvous hashing: Thaler, Ravishankar, 1998); a
    weight makes its part of the keys larger.

    Without a key, ``notify``, ``call``, ``request`` and ``choose`` raise ValueError. What has no
    place for a key (``notify_many``, ``call_many``, ``ventilator``, ``Context.next``, and all that
    a guest sends) goes by the address of the node that sends it.

    :param by_address: go by that address wherever no key is given, as ``ip_hash`` does.
    """

    def __cinit__(self, *, by_address=False):
        self.by_address = by_address

    cdef Py_ssize_t index(self, PyObject** some, Py_ssize_t count, bytes key) except -1:
        cdef Py_ssize_t i, best = 0
        cdef uint64_t hashed
        cdef double score, most = -1.0
        cdef Candidate candidate
        if key is None:
            raise key_is_missing()
        hashed = hash_of(key)
        for i in range(count):
            candidate = candidate_at(some, i)
            # Of a number between 0 and 1 (Schindelhauer, Schomaker, 2005).
            score = -candidate.share / c_log(
                (<double>(mixed(hashed ^ candidate.seed) >> 12) + 0.5) * 2.0 ** -52)
            if score > most:
                most = score
                best = i
        return best


@cython.final
cdef class LeastConnections(CorePolicy):
    """The one with the fewest outstanding; of several such, each in its turn."""

    cdef Py_ssize_t index(self, PyObject** some, Py_ssize_t count, bytes key) except -1:
        cdef Py_ssize_t i, at, best = -1
        cdef int64_t least = 0
        cdef Candidate candidate
        self.turn += 1
        for i in range(count):
            at = <Py_ssize_t>((self.turn + <uint64_t>i) % <uint64_t>count)
            candidate = candidate_at(some, at)
            if best < 0 or candidate.outstanding < least:
                best = at
                least = candidate.outstanding
        return best


@cython.final
cdef class LeastMemory(CorePolicy):
    """The one that uses the smallest share of its memory; none that uses over 90 %.

    One that has not said how much it uses is chosen when nobody else may be.
    """

    cdef Py_ssize_t index(self, PyObject** some, Py_ssize_t count, bytes key) except -1:
        cdef Py_ssize_t i, at, best = -1
        cdef double used, least = 2.0
        self.turn += 1
        for i in range(count):
            at = <Py_ssize_t>((self.turn + <uint64_t>i) % <uint64_t>count)
            used = candidate_at(some, at).memory
            if used < 0.0:
                used = 1.5
            elif used > MEMORY_FULL:
                continue
            if used < least:
                best = at
                least = used
        if best < 0:
            raise errors.Overloaded(
                f"each of {count} uses over {MEMORY_FULL:.0%} of its memory", limit=MEMORY_FULL)
        return best


@cython.final
cdef class PeakEwma(RandomPolicy):
    """Of two that the dice name, the one that is likely to answer first.

    What counts is the latency of late, in which a slow answer counts at once and fades in some ten
    seconds, times what is outstanding (Finagle's peak EWMA; the power of two choices: Mitzenmacher,
    2001).
    """

    cdef Py_ssize_t index(self, PyObject** some, Py_ssize_t count, bytes key) except -1:
        cdef Py_ssize_t one, other
        cdef uint64_t now
        if count == 1:
            return 0
        one = self.below(count)
        other = self.below(count - 1)
        if other >= one:
            other += 1
        now = monotonic_ns()
        if candidate_at(some, other).cost(now) < candidate_at(some, one).cost(now):
            return other
        return one


@cython.final
cdef class UserPolicy(CorePolicy):
    """Somebody's own policy: an object whose ``choose(candidates, key)`` returns one of them."""

    def __cinit__(self, policy not None):
        if not callable(getattr(policy, "choose", None)):
            raise TypeError(f"policy {policy!r} has no method choose(candidates, key)")
        self.policy = policy

    def choose(self, candidates, key=None):
        """What the policy chooses; a TypeError when that is none of ``candidates``."""
        chosen = self.policy.choose(candidates, key)
        for candidate in candidates:
            if candidate is chosen:
                return chosen
        raise TypeError(f"policy {self.policy!r} chose {chosen!r}, which is none of the candidates")


POLICIES = {
    "round_robin": RoundRobin,
    "weighted_round_robin": WeightedRoundRobin,
    "random": Random,
    "weighted_random": WeightedRandom,
    "ip_hash": lambda: KeyHash(by_address=True),
    "url_hash": KeyHash,
    "least_connections": LeastConnections,
    "least_memory": LeastMemory,
    "peak_ewma": PeakEwma,
}


def policy_of(policy):
    """The core's form of a policy: a name of ``POLICIES``, one of its classes' objects, or an
    object of the user's with a method ``choose``.

    :raises ValueError: there is no policy of this name.
    :raises TypeError: it is no policy.
    """
    if isinstance(policy, CorePolicy):
        return policy
    if isinstance(policy, str):
        try:
            return POLICIES[policy]()
        except KeyError:
            raise ValueError(
                f"policy {policy!r}: {', '.join(POLICIES)} are allowed, or an object with a "
                "method choose(candidates, key)") from None
    if isinstance(policy, type):
        raise TypeError(f"policy {policy!r} is a class: make an object of it")
    return UserPolicy(policy)


# ------------------------------------------------------------------------------------- at a router

cdef CorePolicy policy_at(Router router, int channel):
    # The channel's, or the node's; None for turns.
    cdef CorePolicy policy = router.policies.get(channel)
    if policy is None and router.policy is not None:
        policy = router.default_policies.get(channel)
        if policy is None:
            policy = router.default_policies[channel] = policy_of(router.policy)
    return policy


cdef int check_keyless(CorePolicy policy) except -1:
    # Whether the policy can do without a key that the sender could have given.
    if type(policy) is KeyHash and not (<KeyHash>policy).by_address:
        raise key_is_missing()
    return 0


cdef Session choose_session(Router router, int channel, CorePolicy policy, object key,
                            bint keyless):
    # The subscriber that a message goes to by this policy, or the channel's, or the node's.
    cdef Route* route = router.channels[channel].route
    cdef Py_ssize_t i
    cdef list sessions
    if route is NULL:
        return router.pick_named(channel, None)
    if policy is None:
        policy = policy_at(router, channel)
    if policy is None:
        if key is None:
            return route_next(route)
        policy = router.by_key
    if type(policy) is UserPolicy:
        # It runs Python code, which may change the route.
        sessions = members_of(&router.channels[channel].route)
        candidates = tuple([(<Session>session).candidate for session in sessions])
        return sessions[candidates.index(policy.choose(candidates, key))]
    if key is not None:
        key = key_bytes(key)
    elif type(policy) is KeyHash and (keyless or (<KeyHash>policy).by_address):
        key = router.own_address
    route = router.channels[channel].route
    try:
        return <Session><object>route.members[policy.index(route.candidates, route.count, key)]
    except errors.Overloaded as error:
        error.channel = channel
        raise
