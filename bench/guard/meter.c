/* What goes around the part of a program that is counted: measure.py beside this file compiles it,
 * and preloads it into a program that valgrind runs.
 *
 * Between begin and end the clocks stand still, but for a nanosecond each time that one is asked.
 * Under valgrind all is fifty times slower, and what the library does for a time, or after one,
 * would be another amount of work on each machine. */
#define _GNU_SOURCE
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
#include <valgrind/callgrind.h>

enum { CLOCKS = 12 };               /* of the system; those of single processes are not stopped */

static struct timespec stopped[CLOCKS];
static long asked;
static int measuring;

static int kernel_time(clockid_t clock, struct timespec *now)
{
    return (int)syscall(SYS_clock_gettime, clock, now);
}

int clock_gettime(clockid_t clock, struct timespec *now)
{
    if (!measuring || clock < 0 || clock >= CLOCKS)
        return kernel_time(clock, now);
    *now = stopped[clock];
    now->tv_nsec += ++asked;
    if (now->tv_nsec >= 1000000000) {
        now->tv_nsec -= 1000000000;
        now->tv_sec += 1;
    }
    return 0;
}

void meter_begin(void)
{
    clockid_t clock;
    for (clock = 0; clock < CLOCKS; clock++)
        kernel_time(clock, &stopped[clock]);
    asked = 0;
    measuring = 1;
    CALLGRIND_START_INSTRUMENTATION;
}

void meter_end(void)
{
    CALLGRIND_DUMP_STATS_AT("the measured part");
    CALLGRIND_STOP_INSTRUMENTATION;
    measuring = 0;
}
