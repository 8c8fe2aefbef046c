# The descriptor of a session: a raw non-blocking socket, and its registration with the loop.
#
# Invariants: the descriptor is detached from any socket object and closed here only, after both
# registrations are gone (a descriptor closed first leaves the next socket with its number deaf);
# a writer is registered only after EAGAIN. Owned by the loop thread.

cdef extern from *:
    """
    #include <linux/sock_diag.h>
    #include <netinet/in.h>
    #include <netinet/tcp.h>
    #include <poll.h>
    #include <sys/ioctl.h>

    /* Fewer bytes than fill the sender's buffer at its default size, however small the pieces. */
    enum { DOMI_UNREAD_LITTLE = 2048 };

    /* Nanoseconds since the kernel has heard of the other end of a connection that nobody reads
       from, as far as it knows; UINT64_MAX: it cannot say. `unread` is kept from call to call.

       Who has ended it is not silent: that is read in its turn. Nor is who cannot send because of
       what lies unread, as long as its kernel acknowledges what ours asks it. A Unix socket tells
       neither how much its other end may send nor whether that is there; it loses nothing. */
    static uint64_t domi_unread_silence(int fd, uint32_t *unread)
    {
        struct pollfd ended = {fd, POLLRDHUP, 0};
        struct tcp_info tcp;
        uint32_t memory[SK_MEMINFO_VARS] = {0};
        socklen_t size = sizeof tcp;
        uint32_t silent, before = *unread;
        int count = 0;
        memset(&tcp, 0, sizeof tcp);
        if (poll(&ended, 1, 0) != 0)
            return 0;
        if (getsockopt(fd, IPPROTO_TCP, TCP_INFO, &tcp, &size) == 0) {
            silent = tcp.tcpi_last_data_recv;
            size = sizeof memory;
            /* With half of its memory free, a socket has its window open. */
            if (getsockopt(fd, SOL_SOCKET, SO_MEMINFO, memory, &size) < 0
                    || memory[SK_MEMINFO_RMEM_ALLOC] > memory[SK_MEMINFO_RCVBUF] / 2) {
                if (tcp.tcpi_unacked == 0 && tcp.tcpi_probes == 0)
                    return 0;
                if (tcp.tcpi_last_ack_recv < silent)
                    silent = tcp.tcpi_last_ack_recv;
            }
            return silent * 1000000ull;
        }
        if (ioctl(fd, FIONREAD, &count) < 0 || count > DOMI_UNREAD_LITTLE)
            return 0;
        *unread = (uint32_t)count;
        return *unread > before ? 0 : UINT64_MAX;
    }
    """
    uint64_t unread_silence "domi_unread_silence"(int fd, uint32_t* unread) noexcept

cdef object open_drivers = weakref.WeakSet()


cdef class SocketDriver:
    """Owns a non-blocking descriptor.

    :param fd: detached from its socket object (``socket.detach()``).
    """

    def __cinit__(self, Engine engine not None, int fd):
        self.engine = engine
        self.fd = fd
        open_drivers.add(self)

    def __dealloc__(self):
        if self.fd >= 0:
            c_close(self.fd)

    cdef int begin(self, bytes first) except -1:
        # Say this before anything else: 0, or an errno. The socket is empty, and has room for it.
        cdef Py_ssize_t n = c_send(self.fd, PyBytes_AS_STRING(first), len(first))
        return errno if n < 0 else EAGAIN if n < len(first) else 0

    cdef Py_ssize_t recv(self, uint8_t* where, size_t size) except -4096:
        # Bytes received, 0 at the end of the stream, or -errno.
        cdef Py_ssize_t n
        while True:
            n = c_recv(self.fd, where, size)
            if n >= 0:
                return n
            if errno != EINTR:
                return -errno

    cdef Py_ssize_t send(self, WriteQueue queue) except -4096:
        # Bytes that the kernel took, or -errno.
        cdef iovec vectors[MAX_VECTORS]
        cdef msghdr message
        cdef Py_ssize_t n
        cdef int count = queue.gather(vectors, MAX_VECTORS)
        while True:
            if count == 1:
                n = c_send(self.fd, vectors[0].iov_base, vectors[0].iov_len)
            else:
                memset(&message, 0, sizeof(message))
                message.msg_iov = vectors
                message.msg_iovlen = count
                n = c_sendmsg(self.fd, &message)
            if n >= 0:
                return n
            if errno != EINTR:
                return -errno

    cdef int want_read(self, object callback) except -1:
        self.engine.loop.add_reader(self.fd, callback)
        self.reading = True
        self.unwatched = False
        return 0

    cdef int stop_read(self) except -1:
        self.unread = 0
        if self.reading and not self.unwatched:
            self.engine.loop.remove_reader(self.fd)
        self.reading = self.unwatched = False
        return 0

    cdef int unwatch(self) except -1:
        # Whoever wants to read asks the descriptor by hand. With nobody to wake, the peer's sending
        # takes a quarter less.
        if self.reading and not self.unwatched:
            self.unwatched = True
            self.engine.loop.remove_reader(self.fd)
        return 0

    cdef int watch(self, object callback) except -1:
        if self.unwatched and not self.engine.loop.is_closed():
            self.want_read(callback)
        return 0

    cdef int want_write(self, object callback) except -1:
        if not self.writer:
            self.engine.loop.add_writer(self.fd, callback)
            self.writer = True
        self.writing = True
        return 0

    cdef int stop_write(self) except -1:
        if self.writer:
            self.writer = False
            self.engine.loop.remove_writer(self.fd)
        return 0

    cdef int release(self) except -2:
        # The descriptor, which is the caller's now; -1: it is closed.
        cdef int fd = self.fd
        if fd >= 0 and not self.engine.loop.is_closed():
            self.stop_read()
            self.stop_write()
        self.fd = -1
        return fd

    cdef int half_close(self) except -1:
        # Nothing more is sent: the peer will read to an end.
        self.writing = False
        self.stop_write()
        c_shutdown(self.fd, SHUT_WR)
        return 0

    cdef int close(self) except -1:
        cdef int fd = self.fd
        try:
            self.release()
        finally:
            self.reading = self.unwatched = self.writing = False
            self.fd = -1
            if fd >= 0:
                c_close(fd)
        return 0

    def abandon(self):
        """Close the copy of the descriptor in a forked child; the loop is the parent's."""
        if self.fd >= 0:
            c_close(self.fd)
            self.fd = -1
            self.unwatched = False


def abandon_descriptors():
    # A child that keeps its copies would hide the parent's death from the peers.
    cdef Engine engine
    for driver in list(open_drivers):
        driver.abandon()
    for engine in list(engines.values()):
        engine.abandon()
    engines.clear()
    forget_spinners()


os.register_at_fork(after_in_child=abandon_descriptors)
