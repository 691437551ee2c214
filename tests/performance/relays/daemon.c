/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The baseline of Hung 2010 (section 5.1): a relay in user space with one thread that receives and one that sends, one receive
 * and one send for each packet and sink. And the plain copy loop: the same buffer to every sink, as fast as they take it.
 *
 *	daemon relay SOURCE FIRST COUNT		descriptors: the source, and COUNT sinks from FIRST on
 *	daemon copy SECONDS FIRST COUNT BYTES
 */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>

enum { SLOTS = 64, LARGEST = 65536 };

struct slot {
	ssize_t size;
	char bytes[LARGEST];
};

static struct slot ring[SLOTS];
static unsigned long head, tail;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static int first, count;

/* All of it, or none if there is no room; a stream waits for room rather than lose its place. */
static void send_all(int fd, const char *bytes, ssize_t size)
{
	ssize_t sent = 0;

	do {
		ssize_t step = send(fd, bytes + sent, size - sent, MSG_DONTWAIT | MSG_NOSIGNAL);
		struct pollfd room = { .fd = fd, .events = POLLOUT };

		if (step >= 0)
			sent += step;
		else if (errno != EAGAIN || !sent)
			return;
		else
			poll(&room, 1, 100);
	} while (sent < size);
}

static void *send_thread(void *unused)
{
	for (;;) {
		struct slot *slot;

		pthread_mutex_lock(&lock);
		while (tail == head)
			pthread_cond_wait(&changed, &lock);
		slot = &ring[tail % SLOTS];
		pthread_mutex_unlock(&lock);
		if (slot->size <= 0)
			exit(0);
		for (int i = 0; i < count; i++)
			send_all(first + i, slot->bytes, slot->size);
		pthread_mutex_lock(&lock);
		tail++;
		pthread_cond_signal(&changed);
		pthread_mutex_unlock(&lock);
	}
	return unused;
}

static void relay(int source, size_t largest)
{
	pthread_t sender;

	pthread_create(&sender, NULL, send_thread, NULL);
	for (;;) {
		struct slot *slot;

		pthread_mutex_lock(&lock);
		while (head - tail == SLOTS)
			pthread_cond_wait(&changed, &lock);
		slot = &ring[head % SLOTS];
		pthread_mutex_unlock(&lock);
		slot->size = recv(source, slot->bytes, largest, 0);
		pthread_mutex_lock(&lock);
		head++;
		pthread_cond_signal(&changed);
		pthread_mutex_unlock(&lock);
		if (slot->size <= 0)
			pthread_join(sender, NULL);
	}
}

static double now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return time.tv_sec + time.tv_nsec / 1e9;
}

static void copy(double seconds, size_t size)
{
	double end = now() + seconds;
	static char block[1 << 20];
	unsigned long long sent = 0;

	while (now() < end)
		for (int i = 0; i < count; i++) {
			ssize_t step = send(first + i, block, size, MSG_DONTWAIT | MSG_NOSIGNAL);

			if (step > 0)
				sent += step;
		}
	printf("%llu\n", sent);
}

int main(int argc, char **argv)
{
	if (argc < 5)
		return 2;
	first = atoi(argv[3]);
	count = atoi(argv[4]);
	if (!strcmp(argv[1], "relay"))
		relay(atoi(argv[2]), LARGEST);
	else
		copy(atof(argv[2]), atol(argv[5]));
	return 0;
}
