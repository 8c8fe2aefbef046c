# RingBuffer: frames from many threads to one, over the ring of ring.h.
#
# Invariants: a record is a frame's bytes or a reference to a bytes object, which the ring owns from
# put to consume; while a frame is lent out its record stays. put() may be called from any thread,
# everything else from one at a time.

cdef extern from "ring.h":
    enum:
        RING_FRAME
        RING_REFERENCE
        RING_SLEEPS
        RING_SPINS
    Ring* ring_new "domi_ring_new"(uint64_t capacity) noexcept
    void ring_free "domi_ring_free"(Ring* ring) noexcept
    uint64_t ring_most "domi_ring_most"(const Ring* ring) noexcept
    uint8_t* ring_claim "domi_ring_claim"(Ring* ring, uint32_t size) noexcept
    void ring_publish "domi_ring_publish"(Ring* ring, uint8_t* payload, uint32_t size,
                                          int kind) noexcept
    uint8_t* ring_claim_alone "domi_ring_claim_alone"(Ring* ring, uint32_t size) noexcept
    void ring_publish_alone "domi_ring_publish_alone"(Ring* ring, uint8_t* payload, uint32_t size,
                                                      int kind) noexcept
    void ring_rewind "domi_ring_rewind"(Ring* ring) noexcept
    uint8_t* ring_peek "domi_ring_peek"(Ring* ring, uint32_t* size, int* kind) noexcept
    void ring_consume "domi_ring_consume"(Ring* ring, uint8_t* payload, uint32_t size) noexcept
    bint ring_must_wake "domi_ring_must_wake"(Ring* ring) noexcept
    void ring_will_sleep "domi_ring_will_sleep"(Ring* ring, uint32_t how) noexcept
    void ring_is_awake "domi_ring_is_awake"(Ring* ring) noexcept
    bint ring_was_woken "domi_ring_was_woken"(Ring* ring) noexcept nogil
    uint64_t ring_gets "domi_ring_gets"(Ring* ring) noexcept
    uint64_t ring_count "domi_ring_count"(Ring* ring) noexcept
    bint ring_is_empty "domi_ring_is_empty"(Ring* ring) noexcept
    void ring_own "domi_ring_own"(Ring* ring, uint64_t bytes) noexcept
    void ring_disown "domi_ring_disown"(Ring* ring, uint64_t bytes) noexcept
    bint ring_may_own "domi_ring_may_own"(Ring* ring, uint64_t bytes, uint64_t most) noexcept
    uint64_t ring_used "domi_ring_used"(Ring* ring) noexcept

cdef enum:
    RING_LEAST = 1 << 12
    RING_LARGEST = 1 << 30
    RING_BY_REFERENCE = 65536   # larger frames pass as a reference to a bytes object


cdef uint64_t ring_capacity(object size) except 0:
    if not PyLong_Check(size) or PyBool_Check(size):
        raise TypeError(f"ring size {size!r}: a ring's size is an int, in bytes")
    if not RING_LEAST <= size <= RING_LARGEST or size & (size - 1):
        raise ValueError(
            f"ring size {size}: a power of two from {RING_LEAST} to {RING_LARGEST} bytes is wanted")
    return size


@cython.final
cdef class RingBuffer:
    """A queue of whole frames in a fixed block of memory: many threads put, one thread takes.

    There is no lock, and nobody waits: what has no room is refused. A frame is any bytes, b""
    included; each costs 8 bytes and is padded to a multiple of 8. Frames of more than 65,536 bytes,
    or half the ring, pass by reference: they take 16 bytes of the ring, and memory of their own.

    ``put`` may be called from any thread; ``get``, ``drain`` and ``borrow`` from one thread.

    :param size: bytes, a power of two from 4,096 (2**12) to 2**30.
    :raises ValueError: another size. :raises TypeError: a size that is no int.
    """

    def __cinit__(self, size=2097152):
        self.capacity = ring_capacity(size)
        self.ring = ring_new(self.capacity)
        if self.ring is NULL:
            raise MemoryError
        self.most = min(<uint64_t>RING_BY_REFERENCE, ring_most(self.ring))
        live(LIVE_RING, 1)

    def __dealloc__(self):
        if self.ring is not NULL:
            while self.take(NULL):
                pass
            ring_free(self.ring)
            live(LIVE_RING, -1)

    def __len__(self):
        """How many frames it holds."""
        return ring_count(self.ring)

    def __repr__(self):
        return f"<RingBuffer of {self.capacity} bytes, {self.used} used by {len(self)} frames>"

    @property
    def used(self):
        """Bytes that are taken, what each frame costs and the gap before a wrap included."""
        return ring_used(self.ring)

    def put(self, data):
        """Append one frame, from any thread.

        :param data: bytes-like, contiguous. It is copied, unless it is a bytes object that passes
            by reference.
        :raises RingFull: there is no room; nothing was put.
        """
        cdef Py_buffer view
        if PyBytes_CheckExact(data):
            self.put_bytes(<const uint8_t*>PyBytes_AS_STRING(data),
                           <size_t>PyBytes_GET_SIZE(data), data)
            return
        get_view(data, &view)
        try:
            self.put_bytes(<const uint8_t*>view.buf, <size_t>view.len, None)
        finally:
            PyBuffer_Release(&view)

    cdef int put_bytes(self, const uint8_t* data, size_t size, bytes owner) except -1:
        cdef uint8_t* payload
        cdef PyObject* reference
        if size > self.most:
            if owner is None:
                owner = PyBytes_FromStringAndSize(<const char*>data, <Py_ssize_t>size)
            payload = ring_claim(self.ring, sizeof(PyObject*))
            if payload is NULL:
                return self.refuse(size)
            reference = <PyObject*>owner
            Py_INCREF(owner)
            copy(payload, &reference, sizeof(PyObject*))
            ring_publish(self.ring, payload, sizeof(PyObject*), RING_REFERENCE)
            return 0
        payload = ring_claim(self.ring, <uint32_t>size)
        if payload is NULL:
            return self.refuse(size)
        copy(payload, data, size)
        ring_publish(self.ring, payload, <uint32_t>size, RING_FRAME)
        return 0

    cdef int refuse(self, size_t size) except -1:
        raise errors.RingFull(
            f"no room for a frame of {size} bytes: {self.used} of the ring's {self.capacity} bytes "
            "are taken; take frames out faster, or make the ring larger", limit=self.capacity)

    cdef int take(self, PyObject** frame) except -1:
        # Whether there was one. The caller owns what `frame` points to then; NULL drops it.
        cdef uint32_t size
        cdef int kind
        cdef uint8_t* payload = ring_peek(self.ring, &size, &kind)
        cdef PyObject* owner
        cdef bytes made
        if payload is NULL:
            return 0
        if kind == RING_REFERENCE:
            copy(&owner, payload, sizeof(PyObject*))
            ring_consume(self.ring, payload, size)
            if frame is NULL:
                Py_DECREF(<object>owner)
            else:
                frame[0] = owner
            return 1
        if frame is not NULL:
            made = PyBytes_FromStringAndSize(<const char*>payload, size)
            Py_INCREF(made)
            frame[0] = <PyObject*>made
        ring_consume(self.ring, payload, size)
        return 1

    cdef int check_lent(self) except -1:
        if self.lent:
            raise BufferError(
                "a frame of this ring is lent out: leave the block of borrow(), and release every "
                "slice and export of its view")
        return 0

    def get(self):
        """Take the oldest frame out, as bytes; None when there is none.

        :raises BufferError: a frame is lent out.
        """
        cdef PyObject* frame = NULL
        self.check_lent()
        if not self.take(&frame):
            return None
        found = <object>frame
        Py_DECREF(found)
        return found

    def drain(self, limit=None):
        """Take frames out, oldest first: a list of bytes, of at most ``limit`` of them.

        :raises ValueError: ``limit`` is negative. :raises BufferError: a frame is lent out.
        """
        cdef Py_ssize_t most = -1 if limit is None else limit
        cdef PyObject* frame = NULL
        cdef list found = []
        if limit is not None and most < 0:
            raise ValueError(f"limit {limit}: at least 0, or None for all")
        self.check_lent()
        while (most < 0 or len(found) < most) and self.take(&frame):
            found.append(<object>frame)
            Py_DECREF(<object>frame)
        return found

    def borrow(self):
        """Look at the oldest frame without a copy, for the length of a ``with`` block.

        ``with ring.borrow() as view`` gives a read-only memoryview, or None when the ring is empty.
        At the end of the block the view is released and the frame is gone from the ring. A slice or
        another export that is still alive then is a BufferError, and keeps the frame in the ring
        until it is released: memory that somebody can see is never used again. Meanwhile ``get``,
        ``drain`` and ``borrow`` raise BufferError.
        """
        return Borrowed.__new__(Borrowed, self)


# Neither tracked by the collector nor in a cycle: the view leads here, and here leads to it weakly.
@cython.final
@cython.no_gc
cdef class Borrowed:
    """What :meth:`RingBuffer.borrow` gives: a context manager, to be entered once."""

    def __cinit__(self, RingBuffer ring not None):
        self.ring = ring

    def __dealloc__(self):
        if self.held:
            self.end()

    def __enter__(self):
        cdef uint8_t* payload
        if self.entered:
            raise RuntimeError("a borrow() is for one with block: call it again")
        self.ring.check_lent()
        self.entered = True
        payload = ring_peek(self.ring.ring, &self.size, &self.kind)
        if payload is NULL:
            return None
        self.payload = payload
        self.ring.lent = True
        self.held = True
        view = memoryview(self)
        self.view = weakref.ref(view)
        return view

    def __exit__(self, kind, error, trace):
        if not self.held:
            return
        view = self.view()
        try:
            if view is not None:
                view.release()
        except BufferError:
            pass                # it has exports of its own, which are counted here too
        finally:
            self.end()
        if self.exports:
            raise BufferError(
                "a slice or an export of a borrowed frame is still in use: its frame stays in the "
                "ring until that is released")

    cdef int end(self) except -1:
        # The block is over; the frame goes, unless somebody looks at it still.
        self.held = False
        if self.exports == 0:
            self.give_back()
        return 0

    cdef int give_back(self) except -1:
        self.payload = NULL
        self.ring.lent = False
        self.ring.take(NULL)
        return 0

    def __getbuffer__(self, Py_buffer* buffer, int flags):
        cdef PyObject* owner
        if not self.held:
            raise BufferError("a borrowed frame can be seen within its with block only")
        if self.kind == RING_REFERENCE:
            copy(&owner, self.payload, sizeof(PyObject*))
            PyBuffer_FillInfo(buffer, self, PyBytes_AS_STRING(<object>owner),
                              PyBytes_GET_SIZE(<object>owner), 1, flags)
        else:
            PyBuffer_FillInfo(buffer, self, self.payload, self.size, 1, flags)
        self.exports += 1

    def __releasebuffer__(self, Py_buffer* buffer):
        self.exports -= 1
        if self.exports == 0 and not self.held:
            self.give_back()
