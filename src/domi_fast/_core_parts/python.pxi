# What the core uses of CPython and of the kernel beyond Cython's own headers, and what the package
# hands in: the core imports none of the package's modules.

cdef extern from "Python.h":
    ctypedef enum PySendResult:
        PYGEN_RETURN
        PYGEN_ERROR
        PYGEN_NEXT
    object PyBytes_FromStringAndSize(const char* data, Py_ssize_t size)
    int _PyBytes_Resize(PyObject** target, Py_ssize_t size) except -1
    unsigned long PyThread_get_thread_ident() noexcept
    object PyContext_CopyCurrent()
    int PyContext_Enter(object context) except -1
    int PyContext_Exit(object context) except -1
    bint PyLong_Check(object value) noexcept
    long PyLong_AsLongAndOverflow(object value, int* overflow) except? -1
    bint PyCFunction_CheckExact(PyObject* value) noexcept
    void* PyCFunction_GetFunction(PyObject* function) noexcept
    bint PyCoro_CheckExact(PyObject* value) noexcept
    Py_ssize_t Py_REFCNT(PyObject* value) noexcept
    # Declared without an exception clause: the caller looks at the result.
    PyObject* call_one "PyObject_CallOneArg"(PyObject* function, PyObject* argument)
    void PyErr_SetObject(object kind, object value) noexcept

cdef extern from "sys/socket.h" nogil:
    enum:
        MSG_NOSIGNAL
    cdef struct msghdr:
        iovec* msg_iov
        size_t msg_iovlen
    Py_ssize_t c_recv "recv"(int fd, void* where, size_t size, int flags) noexcept
    Py_ssize_t c_send "send"(int fd, const void* where, size_t size, int flags) noexcept
    Py_ssize_t c_sendmsg "sendmsg"(int fd, const msghdr* message, int flags) noexcept

cdef extern from "unistd.h" nogil:
    int c_close "close"(int fd) noexcept

cdef extern from *:
    """
    /* Raises the exception that is set already: lets a Cython `except` clause see it. */
    static int domi_reraise(void) { return -1; }
    """
    int reraise "domi_reraise"() except -1

cdef object log = logging.getLogger("domi_fast")
cdef bint EAGER_TASKS = sys.version_info >= (3, 12)

cdef object errors = None           # the package's exception tree
cdef object library_channel = int   # the package's LibraryChannel


def bind(exceptions, channels):
    """Hand in the package's ``errors`` module and ``LibraryChannel``; called once, at import."""
    global errors, library_channel
    errors = exceptions
    library_channel = channels


def is_debug_build():
    """Whether the core was built with ``DOMI_DEBUG=1`` and counts its live objects."""
    return bool(IS_DEBUG)


def live_objects():
    """Live objects of the core by name; all zero in a release build, which does not count."""
    return {
        "sessions": live_count(LIVE_SESSION),
        "segments": live_count(LIVE_SEGMENT),
        "tails": live_count(LIVE_TAIL),
        "large_frames": live_count(LIVE_BIG),
        "timers": live_count(LIVE_TIMER),
    }
