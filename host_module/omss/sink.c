// SPDX-License-Identifier: GPL-2.0-only
/* The sink tasks: what each sink gets next, in turns. */
#include <linux/file.h>
#include <linux/jiffies.h>
#include <linux/net.h>
#include <linux/tcp.h>
#include "omss.h"

/* Batches to one sink before it is the next one's turn. */
#define MOST_SENDS	4
/* When there is room in a socket and still no memory for what goes into it. */
#define RETRY		msecs_to_jiffies(20)

static void drop(struct omss_sink *sink, unsigned int reason, u64 till)
{
	sink->sent.drops[reason] += till - sink->cursor;
	sink->cursor = till;
}

/* It gets nothing more. Should only we hold it open, it is closed, and leaves. */
static void give_up(struct omss_sink *sink, u32 state, int err)
{
	sink->state = state;
	sink->error = -err;
	WRITE_ONCE(sink->blocked, false);
	if (sink->begun)
		omss_entry_put(sink->begun);
	sink->begun = NULL;
	if (sink->member.held)
		fput(sink->member.held);
	sink->member.held = NULL;
}

static void disconnect(struct omss_sink *sink)
{
	struct file *file = omss_file(sink->member.sk);

	if (file) {
		kernel_sock_shutdown(sink->member.sk->sk_socket, SHUT_RDWR);
		fput(file);
	}
	give_up(sink, OMSS_SINK_DISCONNECTED, 0);
}

/* The newest sync point, if it is of use; else the next to come, if it is of need. */
static void go_to_sync(struct omss_sink *sink, struct omss_ring *ring, u64 head,
		       unsigned int reason)
{
	u64 seq;

	if (!sink->member.session->ts) {
		drop(sink, reason, head - 1);
	} else if (!omss_ring_last_sync(ring, &seq) ||
		   (seq <= sink->cursor && reason == OMSS_DROP_OVERRUN)) {
		sink->state = OMSS_SINK_WAITING;
		sink->wait_from = head;
		sink->reason = reason;
	} else if (seq > sink->cursor) {
		drop(sink, reason, seq);
	}
}

/* More than `lag_soft` behind. */
static void catch_up(struct omss_sink *sink, struct omss_ring *ring, u64 head)
{
	unsigned int reason;

	reason = sink->cursor < READ_ONCE(ring->tail) ? OMSS_DROP_OVERRUN : OMSS_DROP_LAG;
	switch (sink->setup.on_lag) {
	case OMSS_HEAD_DROP:
		drop(sink, reason, head - sink->setup.lag_soft);
		break;
	case OMSS_DROP_TO_SYNC:
		go_to_sync(sink, ring, head, reason);
		break;
	case OMSS_DISCONNECT:
		disconnect(sink);
		break;
	}
}

static void look_for_sync(struct omss_sink *sink, struct omss_ring *ring)
{
	u64 seq;

	if (!omss_ring_find_sync(ring, sink->wait_from, &seq))
		return;
	if (sink->reason != OMSS_DROPS)
		drop(sink, sink->reason, seq);
	sink->cursor = seq;
	sink->state = OMSS_SINK_STREAMING;
}

/* Where it goes on. True: there is something to send. */
static bool place(struct omss_sink *sink, struct omss_ring *ring)
{
	u64 head = READ_ONCE(ring->head);

	if (sink->state == OMSS_SINK_WAITING)
		look_for_sync(sink, ring);
	if (sink->state == OMSS_SINK_STREAMING && head > sink->cursor + sink->setup.lag_soft)
		catch_up(sink, ring, head);
	return sink->begun || (sink->state == OMSS_SINK_STREAMING && sink->cursor < head);
}

/* Why nothing can be sent any more. The socket's error stays for its owner to see. */
static int broken(const struct sock *sk)
{
	int err = READ_ONCE(sk->sk_err);

	if (!sk_is_tcp(sk))
		return READ_ONCE(sk->sk_state) == TCP_ESTABLISHED ? 0 : -ENOTCONN;
	if (err)
		return -err;
	return BIT(READ_ONCE(sk->sk_state)) & (TCPF_ESTABLISHED | TCPF_CLOSE_WAIT) &&
	       !(READ_ONCE(sk->sk_shutdown) & SEND_SHUTDOWN) ? 0 : -EPIPE;
}

/* It is behind, and cannot take anything now. */
static void wait_for_room(struct omss_sink *sink)
{
	struct omss_session *session = sink->member.session;
	unsigned long deadline;

	if (omss_writeable(sink->member.sk))
		timer_reduce(&session->watch, jiffies + RETRY);
	if (!sink->setup.lag_hard)
		return;
	deadline = sink->taken + msecs_to_jiffies(sink->setup.lag_hard);
	if (time_after_eq(jiffies, deadline))
		disconnect(sink);
	else
		timer_reduce(&session->watch, deadline);
}

static int send_next(struct omss_sink *sink, struct omss_batch *batch)
{
	struct omss_ring *ring = &sink->member.session->ring;

	if (sink->begun)
		return omss_send_rest(sink, batch);
	omss_batch_fill(batch, ring, sink->cursor);
	if (!batch->count) /* the tail has overtaken it */
		return 0;
	return sink->member.stream ? omss_send_stream(sink, batch) :
				     omss_send_datagrams(sink, batch);
}

/*
 * Send what there is, to one that is placed. 0: it has all; 1: it could take more; -EAGAIN:
 * it is blocked; or why it cannot go on.
 */
static int send_all(struct omss_sink *sink, struct omss_batch *batch)
{
	struct omss_ring *ring = &sink->member.session->ring;
	int err, turns = 0;
	bool more;

	WRITE_ONCE(sink->blocked, false);
	do {
		err = send_next(sink, batch);
		if (err == -EAGAIN) {
			if (sink->blocked)
				return err;
			/* The callback looks at this: has there been room since? */
			WRITE_ONCE(sink->blocked, true);
			smp_mb(); /* with the atomics that make room, before the callback */
			if (!omss_writeable(sink->member.sk))
				return err;
		} else if (err) {
			break;
		}
		more = place(sink, ring);
	} while (more && ++turns < MOST_SENDS);
	if (err == -EAGAIN)
		return err;
	WRITE_ONCE(sink->blocked, false);
	return err ?: more;
}

/* True: it could take more. Under group->lock. */
static bool serve(struct omss_sink *sink, struct omss_batch *batch)
{
	struct omss_ring *ring = &sink->member.session->ring;
	struct sock *sk = sink->member.sk;
	int err;

	if (sink->state >= OMSS_SINK_FAILED)
		return false;
	err = broken(sk);
	if (err) {
		give_up(sink, OMSS_SINK_FAILED, err);
		return false;
	}
	if (!place(sink, ring)) {
		sink->taken = jiffies;
		WRITE_ONCE(sink->blocked, false);
		return false;
	}
	if (sink->blocked && !omss_writeable(sk)) {
		wait_for_room(sink);
		return false;
	}
	err = send_all(sink, batch);
	if (err == -EAGAIN)
		wait_for_room(sink);
	else if (err < 0)
		give_up(sink, OMSS_SINK_FAILED, err);
	return err > 0;
}

/* From any context, under RCU or with the session held: it is to be looked at soon. */
void omss_sink_wake(struct omss_sink *sink)
{
	struct omss_group *group = sink->group;
	unsigned long flags;

	spin_lock_irqsave(&group->wake_lock, flags);
	if (!sink->left && list_empty(&sink->wake))
		list_add_tail(&sink->wake, &group->woken);
	spin_unlock_irqrestore(&group->wake_lock, flags);
	omss_task_queue(&group->task);
}

static struct omss_sink *next_woken(struct omss_group *group)
{
	struct omss_sink *sink;

	if (list_empty_careful(&group->woken)) /* who comes now queues the task once more */
		return NULL;
	spin_lock_irq(&group->wake_lock);
	sink = list_first_entry_or_null(&group->woken, struct omss_sink, wake);
	if (sink)
		list_del_init(&sink->wake);
	spin_unlock_irq(&group->wake_lock);
	return sink;
}

/* Each turn begins with another sink. */
static void begin_turn(struct omss_group *group)
{
	if (group->left || !test_and_clear_bit(0, &group->due) || !group->count)
		return;
	list_rotate_left(&group->sinks);
	WRITE_ONCE(group->left, group->count);
}

static struct omss_sink *next_in_turn(struct omss_group *group)
{
	struct omss_sink *sink;

	if (!group->left)
		return NULL;
	sink = list_first_entry(&group->sinks, struct omss_sink, node);
	list_move_tail(&sink->node, &group->sinks);
	group->left--;
	return sink;
}

/* A quantum: by turns one of those who waited for room, and one whose turn it is. */
bool omss_group_run(struct omss_task *task, struct omss_batch *batch)
{
	struct omss_group *group = container_of(task, struct omss_group, task);
	unsigned int quantum;
	struct omss_sink *sink;
	bool more;

	mutex_lock(&group->lock);
	begin_turn(group);
	for (quantum = 0; quantum < OMSS_QUANTUM; quantum++) {
		if (quantum & 1)
			sink = next_in_turn(group) ?: next_woken(group);
		else
			sink = next_woken(group) ?: next_in_turn(group);
		if (!sink)
			break;
		if (serve(sink, batch))
			omss_sink_wake(sink);
		cond_resched();
	}
	more = group->left || test_bit(0, &group->due) || quantum == OMSS_QUANTUM;
	mutex_unlock(&group->lock);
	omss_batch_drop(batch);
	return more;
}

/* Whatever the send queue holds already. */
static int push_rest(struct omss_sink *sink, struct omss_batch *batch)
{
	struct sock *sk = sink->member.sk;
	int room, err;

	lock_sock(sk);
	room = sk->sk_sndbuf;
	WRITE_ONCE(sk->sk_sndbuf, INT_MAX / 2);
	release_sock(sk);
	err = omss_send_rest(sink, batch);
	lock_sock(sk);
	WRITE_ONCE(sk->sk_sndbuf, room);
	release_sock(sk);
	return err;
}

/*
 * No new entry for this one, and the rest of one that is begun goes into the send
 * queue: -EAGAIN if it does not, 0 if it is there, or never will be. Under group->lock.
 */
int omss_sink_finish(struct omss_sink *sink, struct omss_batch *batch)
{
	int err = 0;

	if (sink->begun && !broken(sink->member.sk))
		err = push_rest(sink, batch);
	if (sink->state < OMSS_SINK_FAILED)
		sink->state = OMSS_SINK_LEAVING;
	return err == -EAGAIN ? err : 0;
}
