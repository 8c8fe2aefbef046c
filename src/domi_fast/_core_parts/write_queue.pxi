# Frames that wait to be sent, without I/O.
#
# Invariants: a segment holds whole frames and begins with one, so that what was never sent can be
# handed to on_error. Small frames are copied into chunks, the first of an empty queue into less; a
# large bytes object is sent from where it is. An empty queue owns no memory: its segments go back
# to their pool. Owned by the loop thread.

# Free segments of the two usual sizes; the GIL guards them.
cdef SegmentPool smalls = SegmentPool(NULL, SMALL, SMALLS_KEPT)
cdef SegmentPool chunks = SegmentPool(NULL, CHUNK, CHUNKS_KEPT)


cdef Segment* take_segment(size_t capacity, bint begins) except NULL:
    # `begins`: a queue that is empty, which most are again before they need more than a little. A
    # chunk for each of a thousand sessions would be as many pages.
    cdef SegmentPool* pool = &smalls if begins and capacity <= SMALL else &chunks
    cdef Segment* segment = pool.free
    if capacity > pool.capacity:
        return new_segment(capacity)
    if segment is NULL:
        return new_segment(pool.capacity)
    pool.free = segment.next
    pool.room += 1
    live(LIVE_SEGMENT, 1)
    reset_segment(segment)
    return segment


cdef Segment* new_segment(size_t capacity) except NULL:
    cdef Segment* segment = <Segment*>malloc(sizeof(Segment) + capacity)
    if segment is NULL:
        raise MemoryError
    live(LIVE_SEGMENT, 1)
    segment.memory = <uint8_t*>(segment + 1)
    segment.capacity = capacity
    reset_segment(segment)
    return segment


cdef inline void reset_segment(Segment* segment) noexcept:
    segment.next = NULL
    segment.owner = NULL
    segment.size = 0
    segment.sent = 0


cdef void give_segment(Segment* segment) noexcept:
    cdef SegmentPool* pool = &smalls if segment.capacity == SMALL else &chunks
    live(LIVE_SEGMENT, -1)
    Py_XDECREF(segment.owner)
    segment.owner = NULL
    if segment.capacity == pool.capacity and pool.room > 0:
        segment.next = pool.free
        pool.free = segment
        pool.room -= 1
    else:
        free(segment)


cdef inline int append_frame(WriteQueue queue, uint16_t channel, const uint8_t* data, size_t size,
                             const uint8_t* extend, uint16_t extend_size,
                             PyObject* owner) except -1:
    # `owner`: the bytes object that `data` is the memory of, or NULL when it is not one.
    cdef size_t length = HEADER + size + extend_size
    cdef Segment* segment = queue.last
    cdef uint8_t* p
    if owner is not NULL and size >= BY_REFERENCE:
        return queue.append_in_place(channel, size, extend, extend_size, owner)
    if segment is NULL or segment.owner is not NULL or (
            segment.capacity - segment.size < length):
        segment = queue.link(length, False)
    p = segment.memory + segment.size
    write_header(p, <uint32_t>length, extend_size, channel)
    copy(p + HEADER, data, size)
    copy(p + HEADER + size, extend, extend_size)
    segment.size += length
    queue.queued += length
    return 0


cdef inline int append_encoded(WriteQueue queue, const uint8_t* frame, size_t length) except -1:
    # A whole frame, as it is sent.
    cdef Segment* segment = queue.last
    if segment is NULL or segment.owner is not NULL or (
            segment.capacity - segment.size < length):
        segment = queue.link(length, False)
    copy(segment.memory + segment.size, frame, length)
    segment.size += length
    queue.queued += length
    return 0


@cython.final
cdef class WriteQueue:
    """Frames in the order in which they will be sent. Pure: it never touches a socket.

    :ivar queued: bytes that are still to be sent.
    """

    def __dealloc__(self):
        self.clear()

    cdef int append_in_place(self, uint16_t channel, size_t size, const uint8_t* extend,
                             uint16_t extend_size, PyObject* owner) except -1:
        # The data is sent from where it is.
        cdef size_t length = HEADER + size + extend_size
        cdef Segment* segment = self.link(HEADER + <size_t>extend_size, True)
        Py_INCREF(<object>owner)
        segment.owner = owner
        write_header(segment.memory, <uint32_t>length, extend_size, channel)
        copy(segment.memory + HEADER, extend, extend_size)
        segment.size = length
        self.queued += length
        return 0

    cdef Segment* link(self, size_t capacity, bint exact) except NULL:
        cdef Segment* segment = (new_segment(capacity) if exact
                                 else take_segment(capacity, self.head is NULL))
        if self.last is NULL:
            self.head = segment
        else:
            self.last.next = segment
        self.last = segment
        return segment

    cdef int gather(self, iovec* vectors, int most) noexcept:
        # The bytes still to be sent, oldest first; the number of vectors filled.
        cdef Segment* segment = self.head
        cdef int n = 0
        cdef size_t skip, part
        while segment is not NULL and n + 3 <= most:
            skip = segment.sent
            if segment.owner is NULL:
                vectors[n].iov_base = segment.memory + skip
                vectors[n].iov_len = segment.size - skip
                n += 1
            else:
                if skip < HEADER:
                    vectors[n].iov_base = segment.memory + skip
                    vectors[n].iov_len = HEADER - skip
                    n += 1
                    skip = 0
                else:
                    skip -= HEADER
                part = <size_t>load32(segment.memory) - HEADER - load16(segment.memory + 4)
                if skip < part:
                    vectors[n].iov_base = PyBytes_AS_STRING(<object>segment.owner) + skip
                    vectors[n].iov_len = part - skip
                    n += 1
                    skip = 0
                else:
                    skip -= part
                part = load16(segment.memory + 4)
                if skip < part:
                    vectors[n].iov_base = segment.memory + HEADER + skip
                    vectors[n].iov_len = part - skip
                    n += 1
            segment = segment.next
        return n

    cdef void consume(self, size_t size) noexcept:
        # `size` more bytes were sent.
        cdef size_t left
        self.queued -= size
        while self.head is not NULL:
            left = self.head.size - self.head.sent
            if size < left:
                self.head.sent += size
                return
            size -= left
            self.drop_first()

    cdef void drop_first(self) noexcept:
        cdef Segment* segment = self.head
        self.head = segment.next
        if self.head is NULL:
            self.last = NULL
        give_segment(segment)

    cdef void clear(self) noexcept:
        cdef Segment* segment
        while self.head is not NULL:
            segment = self.head
            self.head = segment.next
            give_segment(segment)
        self.last = NULL
        self.queued = self.pinned = 0

    cdef object take(self):
        # The oldest frame of which the peer cannot have got the whole; None: there is none. Of a
        # queue that nothing is sent from any more: it lets go of what it has passed.
        cdef Segment* segment
        cdef RawFrame frame
        while self.head is not NULL:
            segment = self.head
            while self.taken < segment.size:
                self.taken += frame_at(segment, self.taken, &frame)
                try:
                    if self.taken > segment.sent:
                        return frame_object(&frame)
                finally:
                    Py_XDECREF(frame.owner)
            self.queued -= segment.size - segment.sent
            self.taken = 0
            self.drop_first()
        return None

    cdef dict droppable(self, int prefix):
        # How many frames of each channel there are that are a user's and ask for no answer, of
        # those of which the peer cannot have got the whole.
        cdef dict found = {}
        cdef Segment* segment = self.head
        cdef RawFrame frame
        cdef size_t offset
        while segment is not NULL:
            offset = 0
            while offset < segment.size:
                offset += frame_at(segment, offset, &frame)
                Py_XDECREF(frame.owner)     # the segment's own is enough here
                if (offset > segment.sent and frame.channel <= USER_LAST
                        and not asks_for_answer(frame.extend, frame.extend_size, prefix)):
                    found[frame.channel] = found.get(frame.channel, 0) + 1
            segment = segment.next
        return found

    cdef dict drop_oldest(self, size_t wanted, int prefix, dict policies, int policy):
        # Drop the oldest frames that may be dropped, until they are `wanted` bytes or there are no
        # more: how many of each channel. `policies` of channels go before `policy`; only what is
        # to be dropped so is. What is on its way, or pinned, stays.
        cdef dict dropped = {}
        cdef Segment* before = NULL
        cdef Segment* segment = self.head
        cdef Segment* following
        cdef size_t pinned = self.pinned
        cdef size_t offset, length, kept, left, gone = 0
        cdef RawFrame frame
        cdef int channel = -1       # of the frame before; `count` of it were dropped in a row
        cdef uint64_t count = 0
        cdef bint goes = False      # whether its frames may be
        while segment is not NULL and gone < wanted:
            following = segment.next
            left = segment.size - segment.sent
            offset = kept = 0
            while offset < segment.size:
                length = frame_at(segment, offset, &frame)
                Py_XDECREF(frame.owner)     # the segment's own is enough here
                if frame.channel != channel:
                    if count:
                        dropped[channel] = dropped.get(channel, 0) + count
                    channel, count = frame.channel, 0
                    goes = (channel <= USER_LAST
                            and policies.get(channel, policy) == FULL_DROP_OLDEST)
                if (gone < wanted and goes and offset >= segment.sent + pinned
                        and not asks_for_answer(frame.extend, frame.extend_size, prefix)):
                    count += 1
                    gone += length
                else:
                    if kept != offset:
                        memmove(segment.memory + kept, segment.memory + offset, length)
                    kept += length
                offset += length
            pinned -= min(pinned, left)
            segment.size = kept
            if (before is not NULL and before.owner is NULL and segment.owner is NULL
                    and before.capacity - before.size >= kept):
                # What is left of it has room there: no chunk is kept for a few bytes.
                copy(before.memory + before.size, segment.memory, kept)
                before.size += kept
                kept = 0
            if kept == segment.sent:
                if before is NULL:
                    self.head = following
                else:
                    before.next = following
                if self.last is segment:
                    self.last = before
                give_segment(segment)
            else:
                before = segment
            segment = following
        if count:
            dropped[channel] = dropped.get(channel, 0) + count
        self.queued -= gone
        return dropped

    def push(self, channel, bytes data, bytes extend=b""):
        """Queue a frame (for tests; the verbs do it in C)."""
        if not 0 <= channel < MAX_CHANNELS or len(extend) > 0xFFFF:
            raise errors.FrameError("a channel is 0-65535 and an extend at most 65535 bytes")
        append_frame(self, channel, <uint8_t*>PyBytes_AS_STRING(data), len(data),
                     <uint8_t*>PyBytes_AS_STRING(extend), <uint16_t>len(extend), <PyObject*>data)

    def shed(self, Py_ssize_t wanted, *, pinned=0, prefix=0, kept=()):
        """Drop the oldest frames that may be, ``wanted`` bytes of them (for tests): how many of
        each channel. The first ``pinned`` bytes stay, and the channels that are to be ``kept``."""
        self.pinned = pinned
        return self.drop_oldest(
            <size_t>wanted, prefix, dict.fromkeys(kept, FULL_RAISE), FULL_DROP_OLDEST)

    def pull(self, Py_ssize_t most):
        """Take up to ``most`` bytes off the front, as a socket would (for tests)."""
        cdef iovec vectors[MAX_VECTORS]
        cdef int n = self.gather(vectors, MAX_VECTORS)
        cdef list parts = []
        cdef size_t left = <size_t>most
        cdef size_t take
        cdef int i
        for i in range(n):
            take = min(left, vectors[i].iov_len)
            parts.append(PyBytes_FromStringAndSize(<char*>vectors[i].iov_base, take))
            left -= take
        taken = b"".join(parts)
        self.consume(len(taken))
        return taken

    def frames(self):
        """The frames of which not every byte has been taken, as a list of :class:`Frame`."""
        cdef list frames = []
        cdef Segment* segment = self.head
        cdef RawFrame frame
        cdef size_t offset
        while segment is not NULL:
            offset = 0
            while offset < segment.size:
                offset += frame_at(segment, offset, &frame)
                try:
                    if offset > segment.sent:
                        frames.append(frame_object(&frame))
                finally:
                    Py_XDECREF(frame.owner)
            segment = segment.next
        return frames


cdef size_t frame_at(Segment* segment, size_t offset, RawFrame* frame) noexcept:
    # The frame that begins at `offset` of a segment; returns its length. Takes a reference to the
    # segment's owner for the frame.
    cdef uint8_t* p = segment.memory + offset
    cdef uint32_t length = load32(p)
    frame.extend_size = load16(p + 4)
    frame.channel = load16(p + 6)
    frame.size = length - HEADER - frame.extend_size
    frame.owner = segment.owner
    if segment.owner is not NULL:
        Py_INCREF(<object>segment.owner)
        frame.data = <const uint8_t*>PyBytes_AS_STRING(<object>segment.owner)
        frame.extend = p + HEADER
    else:
        frame.data = p + HEADER
        frame.extend = frame.data + frame.size
    return length
