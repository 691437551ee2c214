/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Receivers: takes what comes on COUNT descriptors from FIRST on and throws it away without looking (MSG_TRUNC), until standard
 * input ends; then prints for each how many bytes it got, and in another line how long, in milliseconds, one of them got nothing
 * between two pieces.
 */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

static double now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return time.tv_sec * 1e3 + time.tv_nsec / 1e6;
}

int main(int argc, char **argv)
{
	static char scratch[1 << 20];
	int first = argc > 2 ? atoi(argv[1]) : 0, count = argc > 2 ? atoi(argv[2]) : 0;
	unsigned long long *got = calloc(count + 1, sizeof(*got));
	double *last = calloc(count + 1, sizeof(*last)), longest = 0;
	struct epoll_event events[512], event = { .events = EPOLLIN };
	int watch = epoll_create1(0), open = 1;

	if (!got || !last || !count)
		return 2;
	for (int i = 0; i < count; i++) {
		event.data.u32 = i;
		epoll_ctl(watch, EPOLL_CTL_ADD, first + i, &event);
	}
	event.data.u32 = count;
	epoll_ctl(watch, EPOLL_CTL_ADD, 0, &event);
	while (open) {
		int ready = epoll_wait(watch, events, 512, -1);

		for (int i = 0; i < ready; i++) {
			unsigned int who = events[i].data.u32;
			ssize_t size;

			if (who == (unsigned int)count) {
				open = read(0, scratch, sizeof(scratch)) > 0;
				continue;
			}
			size = recv(first + who, scratch, sizeof(scratch), MSG_DONTWAIT | MSG_TRUNC);
			if (size > 0) {
				double at = now(), gap = got[who] ? at - last[who] : 0;

				longest = gap > longest ? gap : longest;
				last[who] = at;
				got[who] += size;
			} else if (size == 0)
				epoll_ctl(watch, EPOLL_CTL_DEL, first + who, NULL);
		}
	}
	for (int i = 0; i < count; i++)
		printf("%llu ", got[i]);
	printf("\n%.1f\n", longest);
	return 0;
}
