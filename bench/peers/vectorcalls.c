/* The least that calling a handler can cost: vectorcalls of it from a loop in C, and nothing else.
 * A module of Python's, which vectorcalls.py beside this file compiles and loads. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

/* repeat(function, argument, count): function(argument), so many times. */
static PyObject *repeat(PyObject *module, PyObject *args)
{
    PyObject *function, *argument;
    Py_ssize_t count;
    (void)module;
    if (!PyArg_ParseTuple(args, "OOn", &function, &argument, &count))
        return NULL;
    while (count-- > 0) {
        PyObject *arguments[2] = {NULL, argument};
        PyObject *result = PyObject_Vectorcall(
            function, arguments + 1, 1 | PY_VECTORCALL_ARGUMENTS_OFFSET, NULL);
        if (result == NULL)
            return NULL;
        Py_DECREF(result);
    }
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"repeat", repeat, METH_VARARGS, "repeat(function, argument, count)"},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "vectorcalls", NULL, -1, methods, NULL, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit_vectorcalls(void)
{
    return PyModule_Create(&definition);
}
