/* A disk whose syncs take SLOWDISK_MS longer, such as an SD card or a cloud volume: LD_PRELOAD. */

#include <stdlib.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static void wait_for_the_disk(void)
{
    const char *given = getenv("SLOWDISK_MS");
    long ms = given ? atol(given) : 0;
    struct timespec time = { ms / 1000, ms % 1000 * 1000000 };

    nanosleep(&time, NULL);
}

int fsync(int fd)
{
    wait_for_the_disk();
    return syscall(SYS_fsync, fd);
}

int fdatasync(int fd)
{
    wait_for_the_disk();
    return syscall(SYS_fdatasync, fd);
}
