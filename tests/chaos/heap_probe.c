/* Preloaded into the processes of a soak (see heap.py): says how much of a process's heap is in use.
 *
 * A thread looks for the file NAME.ask twice a second, NAME being $MORPH_TEST_HEAP and the process id, takes it away
 * and writes the bytes in use to NAME.told. mallinfo2() takes the locks of malloc, so no signal handler may call it.
 */
#include <malloc.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

static char folder[3072];

static void *answer(void *unused)
{
    char ask[4096], told[4096], fresh[4096];

    for (;; usleep(500000)) {
        snprintf(ask, sizeof ask, "%s/%d.ask", folder, (int)getpid());
        if (unlink(ask) != 0)
            continue;
        struct mallinfo2 heap = mallinfo2();
        snprintf(fresh, sizeof fresh, "%s/%d.new", folder, (int)getpid());
        snprintf(told, sizeof told, "%s/%d.told", folder, (int)getpid());
        FILE *file = fopen(fresh, "w");
        if (file == NULL)
            continue;
        fprintf(file, "%zu %zu\n", heap.uordblks + heap.hblkhd, heap.fordblks);
        if (fclose(file) == 0)
            rename(fresh, told);
    }
    return unused;
}

__attribute__((constructor)) static void begin(void)
{
    const char *given = getenv("MORPH_TEST_HEAP");
    sigset_t all, before;
    pthread_t thread;

    if (given == NULL)
        return;
    snprintf(folder, sizeof folder, "%s", given);
    sigfillset(&all); /* signals are for the threads of the program */
    pthread_sigmask(SIG_BLOCK, &all, &before);
    if (pthread_create(&thread, NULL, answer, NULL) == 0)
        pthread_detach(thread);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}
