/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef _OMSS_H
#define _OMSS_H

#include <linux/bitmap.h>
#include <linux/bvec.h>
#include <linux/hrtimer.h>
#include <linux/mm_types_task.h>
#include <linux/mutex.h>
#include <linux/refcount.h>
#include <linux/sockptr.h>
#include <linux/timer.h>
#include <linux/xarray.h>
#include <net/sock.h>
#include "uapi/omss.h"

#define OMSS_QUANTUM		64	/* sinks, or reads, before a higher class may overtake */
#define OMSS_BATCH		64	/* entries in one send, and bio_vecs */
#define OMSS_BATCH_BYTES	SZ_256K
#define OMSS_TS_PACKET		188
#define OMSS_TS_PIDS		8192

/*
 * Locks, outermost first: session->lock, group->lock, a sink's socket lock; inside
 * all of them the spinlocks: ring.lock, group->wake_lock, the scheduler's. Socket
 * callbacks come with any lock held, in any context: they take the last two only.
 */

/* What workers do: the class queues */
struct omss_batch;

struct omss_task {
	struct list_head node;		/* of its class queue */
	bool (*run)(struct omss_task *task, struct omss_batch *batch);	/* true: once more */
	u8 service_class;
	bool queued, running, again, dead;
};

int omss_schedule_start(void);
void omss_schedule_stop(void);
unsigned int omss_workers(void);
void omss_task_init(struct omss_task *task, unsigned int service_class,
		    bool (*run)(struct omss_task *task, struct omss_batch *batch));
void omss_task_queue(struct omss_task *task);
void omss_task_cancel(struct omss_task *task);

/* ring.c: the payload */

/* Immutable once it is in a ring, but for `sync`. */
struct omss_entry {
	refcount_t users;
	u32 bytes;
	bool sync;			/* under ring.lock */
	u16 frags;
	struct bio_vec frag[];
};

struct omss_ring {
	spinlock_t lock;		/* all below */
	struct omss_entry **slot;
	u32 size;
	u64 head, tail;
	u64 memory;
	u64 syncs;
	u64 last_sync;			/* newest sync point + 1, or 0 */
	bool mark_next;			/* the entry to come is a sync point */
	struct page_frag room;		/* the source task's alone: where payload goes */
};

/* Entries of one ring in a row, for the same for all sinks that stand there. */
struct omss_batch {
	const struct omss_ring *ring;
	u64 from;
	u64 head;			/* of the ring when this was made */
	unsigned int count;
	unsigned int frags;
	size_t bytes;
	struct omss_entry *entry[OMSS_BATCH];
	struct bio_vec frag[OMSS_BATCH];
	struct bio_vec scratch[OMSS_BATCH];
};

int omss_ring_init(struct omss_ring *ring, u32 size);
void omss_ring_free(struct omss_ring *ring);
struct omss_entry *omss_entry_new(unsigned int frags);
void omss_entry_put(struct omss_entry *entry);
int omss_ring_room(struct omss_ring *ring, struct bio_vec *frag, u32 most, u32 least);
struct omss_entry *omss_ring_carve(struct omss_ring *ring, u32 bytes);
void omss_ring_add(struct omss_ring *ring, struct omss_entry *entry);
void omss_ring_mark(struct omss_ring *ring, u64 seq);
bool omss_ring_find_sync(struct omss_ring *ring, u64 from, u64 *seq);
bool omss_ring_last_sync(struct omss_ring *ring, u64 *seq);
void omss_batch_fill(struct omss_batch *batch, struct omss_ring *ring, u64 from);
void omss_batch_drop(struct omss_batch *batch);
unsigned int omss_append_frags(struct bio_vec *to, unsigned int count, unsigned int most,
			       const struct omss_entry *entry, u32 offset);
extern unsigned long omss_max_memory;
extern atomic_long_t omss_memory;

/* member.c: a socket that takes part */
enum omss_role { OMSS_ROLE_SOURCE, OMSS_ROLE_SINK };

struct omss_member {
	enum omss_role role;
	bool stream;			/* TCP */
	struct sock *sk;
	struct omss_session *session;
	struct file *held;		/* a detached session's; under session->lock and group->lock */
	void (*data_ready)(struct sock *sk);
	void (*state_change)(struct sock *sk);
	void (*write_space)(struct sock *sk);
};

int omss_member_attach(struct omss_member *member, struct socket *sock);
void omss_member_detach(struct omss_member *member, bool closing);
struct omss_member *omss_member_of(struct sock *sk);
struct file *omss_file(struct sock *sk);
bool omss_writeable(struct sock *sk);
void omss_members_stop(void);

/* mpegts.c */
struct omss_ts {
	u32 pending;			/* bytes after ring.room.offset that are no entry yet */
	bool lost;			/* memory was short: till the next packet */
	bool have_pat;
	u64 pat;			/* the entry that holds the last PAT */
	DECLARE_BITMAP(programs, OMSS_TS_PIDS);	/* PIDs of its PMTs */
	DECLARE_BITMAP(streams, OMSS_TS_PIDS);	/* whose random access counts */
};

bool omss_ts_begins(const u8 *packet);
bool omss_ts_synced(const u8 *packet);
void omss_ts_packet(struct omss_ts *ts, struct omss_ring *ring, const u8 *packet, u64 seq);
u32 omss_ts_resync(const u8 *bytes, u32 count);
void omss_ts_datagram(struct omss_ts *ts, struct omss_ring *ring, const struct omss_entry *entry);

/* session.c */
struct omss_session {
	refcount_t users;
	u32 id;
	struct rcu_head rcu;
	struct mutex lock;		/* who takes part; not held by workers */
	bool dead;
	struct omss_source setup;
	struct omss_member source;
	struct omss_task task;		/* reads from the source */
	struct omss_ring ring;
	struct omss_ts *ts;
	u64 received;
	u64 dropped[OMSS_DROPS];
	bool over;			/* the source has come to its end */
	int error;
	struct list_head groups;	/* RCU; they stay till the end */
	unsigned int next_shard;
	struct xarray sinks;		/* under lock */
	u32 next_sink;
	unsigned int count;
	u32 burst;			/* so many entries do not wait for more */
	u64 turned;			/* head when the last turn was due */
	struct hrtimer due;		/* the latency budget */
	struct timer_list watch;	/* looks after sinks that take nothing */
	struct omss_counters gone;	/* of sinks that have left */
};

/* The sinks of a session of one class and one shard: what one worker serves at a time. */
struct omss_group {
	struct omss_task task;
	struct omss_session *session;
	struct list_head node;
	unsigned int shard;
	struct rcu_head rcu;
	struct mutex lock;		/* sinks, and what they stand at */
	struct list_head sinks;
	unsigned int count;
	unsigned int left;		/* not served yet in this turn */
	unsigned long due;		/* bit 0: a turn is wanted */
	spinlock_t wake_lock;		/* woken */
	struct list_head woken;
};

struct omss_sink {
	struct omss_member member;	/* first: freed by it */
	u64 id;
	struct omss_add_sink setup;
	struct omss_group *group;
	struct list_head node;
	struct list_head wake;		/* under group->wake_lock */
	bool left;			/* the same */
	/* The rest under group->lock. */
	u32 state;
	int error;
	u64 cursor;			/* the first entry not begun */
	struct omss_entry *begun;	/* the one before it, if only some of it is sent */
	u32 offset;			/* how much */
	u64 wait_from;			/* OMSS_SINK_WAITING: sync points before it do not count */
	unsigned int reason;		/* ... why it lost those till then; OMSS_DROPS: it joins */
	bool blocked;
	bool no_bursts;			/* the route cannot do UDP_SEGMENT */
	unsigned long taken;		/* jiffies: when it last took something or had all */
	struct omss_counters sent;
	struct rcu_head rcu;
};

struct omss_session *omss_session_find(struct sock *sk, u64 id);
void omss_session_put(struct omss_session *session);
int omss_set_source(struct sock *sk, const struct omss_source *setup);
int omss_add_sink(struct sock *sk, const struct omss_add_sink *call);
int omss_remove_sink(struct sock *sk, const struct omss_remove_sink *call);
int omss_end(struct sock *sk, u64 id);
int omss_adopt(struct sock *sk, struct omss_adopt *call);
void omss_session_closed(struct omss_member *member, struct omss_session *session);
void omss_session_turn(struct omss_session *session);
void omss_session_arrived(struct omss_session *session, bool now);
bool omss_may(const struct sock *sk);
struct omss_session *omss_session_next(u32 after);
extern unsigned int omss_max_sinks;

/* source.c, sink.c, send.c, datagram.c, status.c */
bool omss_source_run(struct omss_task *task, struct omss_batch *batch);
bool omss_group_run(struct omss_task *task, struct omss_batch *batch);
void omss_sink_wake(struct omss_sink *sink);
int omss_sink_finish(struct omss_sink *sink, struct omss_batch *batch);
int omss_send_stream(struct omss_sink *sink, struct omss_batch *batch);
int omss_send_datagrams(struct omss_sink *sink, struct omss_batch *batch);
int omss_send_datagram(struct sock *sk, const struct bio_vec *frag, unsigned int frags,
		       size_t bytes);
int omss_send_rest(struct omss_sink *sink, struct omss_batch *batch);
void omss_add_counters(struct omss_counters *to, const struct omss_counters *from);
int omss_get_status(struct sock *sk, struct omss_request *request, char __user *to, int room);
extern unsigned int omss_copy_below;

#endif
