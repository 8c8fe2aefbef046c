# What the core uses of CPython and of the kernel beyond Cython's own headers, and what the package
# hands in: the core imports none of the package's modules.

cdef extern from "Python.h":
    ctypedef enum PySendResult:
        PYGEN_RETURN
        PYGEN_ERROR
        PYGEN_NEXT
    object PyBytes_FromStringAndSize(const char* data, Py_ssize_t size)
    # Declared without an exception clause: what a failure leaves has to be put right first.
    int _PyBytes_Resize(PyObject** target, Py_ssize_t size) noexcept
    object PyContext_CopyCurrent()
    int PyContext_Enter(object context) except -1
    int PyContext_Exit(object context) except -1
    PyObject* PyList_GET_ITEM(list items, Py_ssize_t i) noexcept     # borrowed
    list PyList_New(Py_ssize_t size)                                # its places are NULL yet
    void PyList_SET_ITEM(list items, Py_ssize_t i, object item) noexcept    # takes a reference
    bint PyLong_Check(object value) noexcept
    bint PyBool_Check(object value) noexcept
    long PyLong_AsLongAndOverflow(object value, int* overflow) except? -1
    bint PyCFunction_CheckExact(PyObject* value) noexcept
    void* PyCFunction_GetFunction(PyObject* function) noexcept
    bint PyCoro_CheckExact(PyObject* value) noexcept
    Py_ssize_t Py_REFCNT(PyObject* value) noexcept
    void PyErr_SetObject(object kind, object value) noexcept

cdef extern from *:
    """
    #include <pythread.h>

    /* The number of this thread, as threading.get_ident() has it: without a call where it is known
       to be the thread pointer, for each message asks. */
    static inline unsigned long domi_thread_here(void)
    {
    #if defined(__x86_64__) && defined(__linux__) && defined(__LP64__)
        unsigned long here;
        __asm__("movq %%fs:0, %0" : "=r"(here));
        return here;
    #else
        return PyThread_get_thread_ident();
    #endif
    }
    """
    unsigned long thread_here "domi_thread_here"() noexcept

cdef extern from *:
    """
    static inline void domi_prefetch(const void *memory, size_t size)
    {
        for (size_t at = 0; at < size; at += 64)
            __builtin_prefetch((const char *)memory + at, 1);
        __builtin_prefetch((const char *)memory + size - 1, 1);
    }
    """
    # That these bytes will be wanted soon; NULL is nothing.
    void prefetch "domi_prefetch"(void* memory, size_t size) noexcept nogil

cdef extern from "sys/socket.h" nogil:
    cdef struct msghdr:
        iovec* msg_iov
        size_t msg_iovlen
    int SHUT_WR
    int c_shutdown "shutdown"(int fd, int how) noexcept

cdef extern from *:
    """
    #include <sys/socket.h>
    #include <sys/syscall.h>
    #include <unistd.h>

    /* The C library's own are cancellation points, which in a process with threads costs each call
       two atomic exchanges. A sanitizer watches those, though. */
    #if defined(__has_feature)
    #if __has_feature(address_sanitizer)
    #define __SANITIZE_ADDRESS__ 1
    #endif
    #endif
    #if defined(__linux__) && defined(__LP64__) && defined(SYS_sendto) \\
        && !defined(__SANITIZE_ADDRESS__)
    #define DOMI_RECV(fd, where, size) \\
        syscall(SYS_recvfrom, (fd), (where), (size), 0, NULL, NULL)
    #define DOMI_SEND(fd, where, size) \\
        syscall(SYS_sendto, (fd), (where), (size), MSG_NOSIGNAL, NULL, 0)
    #define DOMI_SENDMSG(fd, message) syscall(SYS_sendmsg, (fd), (message), MSG_NOSIGNAL)
    #else
    #define DOMI_RECV(fd, where, size) recv((fd), (where), (size), 0)
    #define DOMI_SEND(fd, where, size) send((fd), (where), (size), MSG_NOSIGNAL)
    #define DOMI_SENDMSG(fd, message) sendmsg((fd), (message), MSG_NOSIGNAL)
    #endif
    """
    Py_ssize_t c_recv "DOMI_RECV"(int fd, void* where, size_t size) noexcept nogil
    Py_ssize_t c_send "DOMI_SEND"(int fd, const void* where, size_t size) noexcept nogil
    Py_ssize_t c_sendmsg "DOMI_SENDMSG"(int fd, const msghdr* message) noexcept nogil

cdef extern from *:
    """
    #include <sys/ioctl.h>
    #ifdef __linux__
    #include <linux/sockios.h>
    #endif

    /* What one process writes to a UNIX socket stands in the other's at once. */
    static inline int domi_bytes_on_their_way(int fd)
    {
        int left = 0;
    #ifdef SIOCOUTQ
        int domain = AF_UNIX;
        socklen_t size = sizeof(domain);
        if (getsockopt(fd, SOL_SOCKET, SO_DOMAIN, &domain, &size) < 0 || domain == AF_UNIX
                || ioctl(fd, SIOCOUTQ, &left) < 0)
            return 0;
    #endif
        return left;
    }
    """
    # Of what was written to a socket, those that the peer's machine has not acknowledged.
    int bytes_on_their_way "domi_bytes_on_their_way"(int fd) noexcept nogil

cdef extern from "unistd.h" nogil:
    int c_close "close"(int fd) noexcept

cdef extern from "sched.h" nogil:
    int sched_yield() noexcept

cdef extern from *:
    """
    /* A new object of this class, by the __new__ of the type that it inherits it from. */
    static inline PyObject *domi_new_of(PyTypeObject *inherits, PyObject *kind, PyObject *args)
    {
        return inherits->tp_new((PyTypeObject *)kind, args, NULL);
    }
    #define domi_new_tuple(kind, args) domi_new_of(&PyTuple_Type, kind, args)
    #define domi_new_error(kind, args) \\
        domi_new_of((PyTypeObject *)PyExc_Exception, kind, args)
    """
    object new_tuple "domi_new_tuple"(object kind, tuple args)
    # Without its __init__: the arguments are what the error says.
    object new_error "domi_new_error"(object kind, tuple args)

cdef extern from *:
    """
    /* Raises the exception that is set already: lets a Cython `except` clause see it. */
    static int domi_reraise(void) { return -1; }
    """
    int reraise "domi_reraise"() except -1

cdef extern from *:
    """
    /* The value of an int below 2**30, without a call; negative for everything else. */
    static inline long domi_small_int(PyObject *value)
    {
    #ifndef Py_LIMITED_API
        if (!PyLong_CheckExact(value)) return -1;
    #if PY_VERSION_HEX >= 0x030C0000
        if (PyUnstable_Long_IsCompact((PyLongObject *)value))
            return (long)PyUnstable_Long_CompactValue((PyLongObject *)value);
    #else
        if (Py_SIZE(value) == 1) return (long)((PyLongObject *)value)->ob_digit[0];
        if (Py_SIZE(value) == 0) return 0;
    #endif
    #endif
        return -1;
    }
    """
    long small_int "domi_small_int"(object value) noexcept

cdef extern from *:
    """
    /* PyObject_CallOneArg without its check that what was called raised properly. */
    static inline PyObject *domi_call_one(PyObject *function, PyObject *argument)
    {
    #ifndef Py_LIMITED_API
        PyTypeObject *type = Py_TYPE(function);
        if (PyType_HasFeature(type, Py_TPFLAGS_HAVE_VECTORCALL)) {
            PyObject *arguments[2] = {NULL, argument};
            vectorcallfunc call = *(vectorcallfunc *)(
                (char *)function + type->tp_vectorcall_offset);
            if (call != NULL)
                return call(function, arguments + 1, 1 | PY_VECTORCALL_ARGUMENTS_OFFSET, NULL);
        }
    #endif
        return PyObject_CallOneArg(function, argument);
    }
    """
    # Declared without an exception clause: the caller looks at the result.
    PyObject* call_one "domi_call_one"(PyObject* function, PyObject* argument)

cdef object log = logging.getLogger("domi_fast.core")
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
        "rings": live_count(LIVE_RING),
    }
