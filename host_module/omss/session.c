// SPDX-License-Identifier: GPL-2.0-only
/* Sessions: who takes part, from the first call to the end. */
#include <linux/file.h>
#include <linux/module.h>
#include <linux/net.h>
#include <linux/slab.h>
#include <net/net_namespace.h>
#include "compat.h"
#include "omss.h"

#define DEFAULT_RING		256
#define DEFAULT_ENTRY		4096
#define LEAST_RING		2

unsigned int omss_max_sinks;
module_param_named(max_sinks, omss_max_sinks, uint, 0644);
MODULE_PARM_DESC(max_sinks, "sinks of all sessions together (0: no limit)");

static DEFINE_XARRAY_ALLOC1(sessions);
static u32 next_session;
static atomic_t sinks = ATOMIC_INIT(0);

bool omss_may(const struct sock *sk)
{
	return ns_capable(sock_net(sk)->user_ns, CAP_NET_ADMIN);
}

/* The session with this id, or the socket's own, if the caller may touch it. */
struct omss_session *omss_session_find(struct sock *sk, u64 id)
{
	struct omss_session *session = NULL;
	struct omss_member *member;

	rcu_read_lock();
	if (!id) {
		member = omss_member_of(sk);
		session = member ? member->session : NULL;
	} else if (id <= U32_MAX) {
		session = xa_load(&sessions, id);
	}
	if (session && !refcount_inc_not_zero(&session->users))
		session = NULL;
	rcu_read_unlock();
	if (!session)
		return ERR_PTR(-ENOENT);
	if (omss_may(session->source.sk))
		return session;
	omss_session_put(session);
	return ERR_PTR(-EPERM);
}

/* The first with a greater id; NULL: none. */
struct omss_session *omss_session_next(u32 after)
{
	unsigned long id = after;
	struct omss_session *session;

	rcu_read_lock();
	do {
		session = xa_find_after(&sessions, &id, ULONG_MAX, XA_PRESENT);
	} while (session && !refcount_inc_not_zero(&session->users));
	rcu_read_unlock();
	return session;
}

static void free_session(struct omss_session *session)
{
	struct omss_group *group, *next;

	list_for_each_entry_safe(group, next, &session->groups, node)
		kfree_rcu(group, rcu);
	if (session->ring.slot)
		omss_ring_free(&session->ring);
	xa_destroy(&session->sinks);
	if (session->source.sk)
		sock_put(session->source.sk);
	kfree(session->ts);
	kfree_rcu(session, rcu);
}

void omss_session_put(struct omss_session *session)
{
	if (refcount_dec_and_test(&session->users))
		free_session(session);
}

/* A turn for everyone. From any context. */
void omss_session_turn(struct omss_session *session)
{
	struct omss_group *group;

	WRITE_ONCE(session->turned, READ_ONCE(session->ring.head));
	rcu_read_lock();
	list_for_each_entry_rcu(group, &session->groups, node) {
		if (!READ_ONCE(group->count))
			continue;
		set_bit(0, &group->due);
		omss_task_queue(&group->task);
	}
	rcu_read_unlock();
}

static enum hrtimer_restart due(struct hrtimer *timer)
{
	omss_session_turn(container_of(timer, struct omss_session, due));
	return HRTIMER_NORESTART;
}

static void watch(struct timer_list *timer)
{
	omss_session_turn(container_of(timer, struct omss_session, watch));
}

/*
 * The source task has added entries. They may wait for more up to the latency budget,
 * counted from the first, but not till sinks have to lose them.
 */
void omss_session_arrived(struct omss_session *session, bool now)
{
	u64 waiting = session->ring.head - READ_ONCE(session->turned);

	if (now || !session->setup.latency || waiting >= READ_ONCE(session->burst))
		omss_session_turn(session);
	else if (!hrtimer_is_queued(&session->due))
		hrtimer_start(&session->due, ms_to_ktime(session->setup.latency),
			      HRTIMER_MODE_REL_SOFT);
}

static int check_source(struct omss_source *setup, const struct sock *sk)
{
	setup->ring = setup->ring ?: DEFAULT_RING;
	if (!setup->entry)
		setup->entry = sk_is_tcp(sk) ? DEFAULT_ENTRY : OMSS_MAX_ENTRY;
	if (setup->flags & ~(OMSS_DETACHED | OMSS_COPY) || setup->framing > OMSS_MPEGTS ||
	    setup->ring < LEAST_RING || setup->ring > OMSS_MAX_RING ||
	    setup->entry < OMSS_TS_PACKET || setup->entry > OMSS_MAX_ENTRY ||
	    setup->latency > OMSS_MAX_LATENCY || setup->service_class >= OMSS_CLASSES)
		return -EINVAL;
	return 0;
}

static struct omss_session *new_session(const struct omss_source *setup)
{
	struct omss_session *session = kzalloc(sizeof(*session), GFP_KERNEL_ACCOUNT);
	int err = 0;

	if (!session)
		return ERR_PTR(-ENOMEM);
	refcount_set(&session->users, 1);
	mutex_init(&session->lock);
	session->setup = *setup;
	session->burst = max(setup->ring / 2, 1u);
	INIT_LIST_HEAD(&session->groups);
	xa_init_flags(&session->sinks, XA_FLAGS_ALLOC1 | XA_FLAGS_ACCOUNT);
	omss_task_init(&session->task, setup->service_class, omss_source_run);
	hrtimer_init(&session->due, CLOCK_MONOTONIC, HRTIMER_MODE_REL_SOFT);
	session->due.function = due;
	timer_setup(&session->watch, watch, 0);
	err = omss_ring_init(&session->ring, setup->ring);
	if (!err && setup->framing == OMSS_MPEGTS) {
		session->ts = kzalloc(sizeof(*session->ts), GFP_KERNEL_ACCOUNT);
		err = session->ts ? 0 : -ENOMEM;
	}
	if (!err)
		return session;
	omss_session_put(session);
	return ERR_PTR(err);
}

int omss_set_source(struct sock *sk, const struct omss_source *call)
{
	struct socket *sock = sk->sk_socket;
	struct omss_source setup = *call;
	struct omss_session *session;
	int err = check_source(&setup, sk);

	if (err)
		return err;
	session = new_session(&setup);
	if (IS_ERR(session))
		return PTR_ERR(session);
	err = xa_alloc_cyclic(&sessions, &session->id, NULL, xa_limit_32b, &next_session,
			      GFP_KERNEL);
	if (err < 0)
		goto err_free;
	session->source.role = OMSS_ROLE_SOURCE;
	session->source.session = session;
	mutex_lock(&session->lock);
	err = omss_member_attach(&session->source, sock);
	if (err)
		goto err_unlock;
	sock_hold(sk); /* for as long as someone may look at the session */
	if (setup.flags & OMSS_DETACHED)
		session->source.held = get_file(sock->file);
	xa_store(&sessions, session->id, session, GFP_KERNEL);
	mutex_unlock(&session->lock);
	omss_task_queue(&session->task); /* something may be there already */
	return 0;

err_unlock:
	session->source.sk = NULL;
	mutex_unlock(&session->lock);
	xa_erase(&sessions, session->id);
err_free:
	omss_session_put(session);
	return err;
}

/* Where a new sink of this class belongs: shards are filled in turn. */
static struct omss_group *group_for(struct omss_session *session, unsigned int service_class)
{
	unsigned int shard = session->next_shard++ % omss_workers();
	struct omss_group *group;

	list_for_each_entry(group, &session->groups, node)
		if (group->task.service_class == service_class && group->shard == shard)
			return group;
	group = kzalloc(sizeof(*group), GFP_KERNEL_ACCOUNT);
	if (!group)
		return NULL;
	omss_task_init(&group->task, service_class, omss_group_run);
	group->session = session;
	group->shard = shard;
	mutex_init(&group->lock);
	INIT_LIST_HEAD(&group->sinks);
	spin_lock_init(&group->wake_lock);
	INIT_LIST_HEAD(&group->woken);
	list_add_tail_rcu(&group->node, &session->groups);
	return group;
}

static int check_sink(const struct omss_add_sink *call)
{
	return call->service_class >= OMSS_CLASSES || call->join > OMSS_FROM ||
	       (call->from && call->join != OMSS_FROM) ||
	       call->on_lag > OMSS_DISCONNECT ? -EINVAL : 0;
}

static bool full(const struct omss_session *session)
{
	unsigned int most = READ_ONCE(omss_max_sinks);

	return (session->setup.max_sinks && session->count >= session->setup.max_sinks) ||
	       (most && atomic_read(&sinks) >= most);
}

/* Where it begins. Under group->lock, before anyone serves it. */
static void join(struct omss_sink *sink, struct omss_ring *ring)
{
	spin_lock(&ring->lock);
	sink->cursor = ring->head;
	if (sink->setup.join == OMSS_OLDEST)
		sink->cursor = ring->tail;
	else if (sink->setup.join == OMSS_FROM)
		sink->cursor = min(sink->setup.from, ring->head);
	spin_unlock(&ring->lock);
	sink->reason = OMSS_DROPS;
	sink->state = OMSS_SINK_STREAMING;
	if (sink->setup.join == OMSS_NEXT_SYNC && sink->member.session->ts) {
		sink->state = OMSS_SINK_WAITING;
		sink->wait_from = sink->cursor;
	}
}

static void enter(struct omss_sink *sink, struct omss_group *group)
{
	struct omss_session *session = sink->member.session;

	mutex_lock(&group->lock);
	join(sink, &session->ring);
	list_add_tail(&sink->node, &group->sinks);
	WRITE_ONCE(group->count, group->count + 1);
	mutex_unlock(&group->lock);
	session->count++;
	WRITE_ONCE(session->burst, clamp(sink->setup.lag_soft / 2, 1u, session->burst));
	omss_sink_wake(sink);
}

static struct omss_sink *new_sink(struct omss_session *session, const struct omss_add_sink *call)
{
	struct omss_sink *sink = kzalloc(sizeof(*sink), GFP_KERNEL_ACCOUNT);

	if (!sink)
		return NULL;
	sink->member.role = OMSS_ROLE_SINK;
	sink->member.session = session;
	sink->setup = *call;
	if (!sink->setup.lag_soft || sink->setup.lag_soft > session->ring.size)
		sink->setup.lag_soft = session->ring.size;
	INIT_LIST_HEAD(&sink->wake);
	sink->taken = jiffies;
	return sink;
}

/* Under session->lock. */
static int add_socket(struct omss_session *session, struct socket *sock,
		      const struct omss_add_sink *call)
{
	struct omss_group *group;
	struct omss_sink *sink;
	u32 id;
	int err;

	if (session->dead)
		return -ENOENT;
	if (full(session))
		return -ENOSPC;
	sink = new_sink(session, call);
	if (!sink)
		return -ENOMEM;
	group = group_for(session, call->service_class);
	err = -ENOMEM;
	if (!group)
		goto err_free;
	sink->group = group;
	sink->left = true; /* not woken before it is where it belongs */
	err = xa_alloc_cyclic(&session->sinks, &id, sink, xa_limit_32b, &session->next_sink,
			      GFP_KERNEL_ACCOUNT);
	if (err < 0)
		goto err_free;
	sink->id = id;
	err = omss_member_attach(&sink->member, sock);
	if (err)
		goto err_erase;
	if (session->source.held)
		sink->member.held = get_file(sock->file);
	atomic_inc(&sinks);
	sink->left = false;
	enter(sink, group);
	return 0;

err_erase:
	xa_erase(&session->sinks, id);
err_free:
	kfree_rcu(sink, rcu); /* a callback may have seen it */
	return err;
}

int omss_add_sink(struct sock *sk, const struct omss_add_sink *call)
{
	struct omss_session *session;
	struct socket *sock;
	int err = check_sink(call);

	if (err)
		return err;
	session = omss_session_find(sk, call->session);
	if (IS_ERR(session))
		return PTR_ERR(session);
	sock = sockfd_lookup(call->fd, &err);
	if (sock) {
		mutex_lock(&session->lock);
		err = add_socket(session, sock, call);
		mutex_unlock(&session->lock);
		sockfd_put(sock);
	}
	omss_session_put(session);
	return err;
}

/* Under session->lock: it is in nobody's hands any more. */
static void drop_sink(struct omss_session *session, struct omss_sink *sink, bool closing)
{
	struct omss_group *group = sink->group;

	mutex_lock(&group->lock);
	list_del(&sink->node);
	WRITE_ONCE(group->count, group->count - 1);
	group->left = min(group->left, group->count);
	spin_lock_irq(&group->wake_lock);
	sink->left = true;
	list_del_init(&sink->wake);
	spin_unlock_irq(&group->wake_lock);
	mutex_unlock(&group->lock);
	xa_erase(&session->sinks, sink->id);
	session->count--;
	atomic_dec(&sinks);
	omss_add_counters(&session->gone, &sink->sent);
	omss_member_detach(&sink->member, closing);
	if (sink->begun)
		omss_entry_put(sink->begun);
	kfree_rcu(sink, rcu);
}

/* It takes no new entry, and what is left of one goes out; -EAGAIN: it does not. */
static int halt_sink(struct omss_sink *sink)
{
	struct omss_batch *batch = kzalloc(sizeof(*batch), GFP_KERNEL);
	struct file *file;
	int err = 0;

	if (!batch)
		return -ENOMEM;
	mutex_lock(&sink->group->lock);
	file = omss_file(sink->member.sk);
	if (file) {
		err = omss_sink_finish(sink, batch);
		fput(file);
	}
	mutex_unlock(&sink->group->lock);
	kfree(batch);
	return err;
}

static int remove(struct omss_session *session, struct omss_sink *sink, u32 flags)
{
	int err = halt_sink(sink);

	if (!err && !(flags & OMSS_HALT))
		drop_sink(session, sink, false);
	return err;
}

/* Under session->lock. */
static struct omss_sink *sink_at(struct omss_session *session, struct sock *sk)
{
	struct omss_member *member;

	rcu_read_lock();
	member = omss_member_of(sk);
	if (member && (member->session != session || member->role != OMSS_ROLE_SINK))
		member = NULL;
	rcu_read_unlock();
	return member ? container_of(member, struct omss_sink, member) : NULL;
}

static int remove_by_id(struct omss_session *session, u64 id, u32 flags)
{
	struct omss_sink *sink;
	int err = -ENOENT;

	mutex_lock(&session->lock);
	sink = id <= U32_MAX ? xa_load(&session->sinks, id) : NULL;
	if (sink && !session->dead)
		err = remove(session, sink, flags);
	mutex_unlock(&session->lock);
	return err;
}

static int remove_socket(struct sock *sk, u32 flags)
{
	struct omss_session *session = omss_session_find(sk, 0);
	struct omss_sink *sink;
	int err = -ENOENT;

	if (IS_ERR(session))
		return PTR_ERR(session);
	mutex_lock(&session->lock);
	sink = session->dead ? NULL : sink_at(session, sk);
	if (sink)
		err = remove(session, sink, flags);
	mutex_unlock(&session->lock);
	omss_session_put(session);
	return err;
}

int omss_remove_sink(struct sock *sk, const struct omss_remove_sink *call)
{
	struct omss_session *session;
	struct socket *sock;
	int err;

	if (call->flags & ~OMSS_HALT)
		return -EINVAL;
	if (call->sink) {
		session = omss_session_find(sk, call->session);
		if (IS_ERR(session))
			return PTR_ERR(session);
		err = remove_by_id(session, call->sink, call->flags);
		omss_session_put(session);
		return err;
	}
	if (call->fd == -1)
		return remove_socket(sk, call->flags);
	sock = sockfd_lookup(call->fd, &err);
	if (!sock)
		return err;
	err = sock->sk && sk_is_inet(sock->sk) ? remove_socket(sock->sk, call->flags) : -ENOENT;
	sockfd_put(sock);
	return err;
}

/* Under session->lock, once. */
static void end_session(struct omss_session *session, bool closing)
{
	struct omss_group *group;
	struct omss_sink *sink;
	unsigned long id;

	session->dead = true;
	xa_erase(&sessions, session->id);
	omss_task_cancel(&session->task);
	list_for_each_entry(group, &session->groups, node)
		omss_task_cancel(&group->task);
	xa_for_each(&session->sinks, id, sink) {
		halt_sink(sink);
		drop_sink(session, sink, false);
	}
	hrtimer_cancel(&session->due);
	timer_shutdown_sync(&session->watch);
	omss_member_detach(&session->source, closing);
	omss_session_put(session);
}

int omss_end(struct sock *sk, u64 id)
{
	struct omss_session *session = omss_session_find(sk, id);
	int err = -ENOENT;

	if (IS_ERR(session))
		return PTR_ERR(session);
	mutex_lock(&session->lock);
	if (!session->dead) {
		end_session(session, false);
		err = 0;
	}
	mutex_unlock(&session->lock);
	omss_session_put(session);
	return err;
}

/* The release() of a socket that was seen to be a member; it may not be one any more. */
void omss_session_closed(struct omss_member *member, struct omss_session *session)
{
	struct omss_sink *sink;
	unsigned long id;

	mutex_lock(&session->lock);
	if (session->dead)
		goto out;
	if (member == &session->source) {
		end_session(session, true);
		goto out;
	}
	xa_for_each(&session->sinks, id, sink) {
		if (&sink->member == member) {
			drop_sink(session, sink, true);
			break;
		}
	}
out:
	mutex_unlock(&session->lock);
}

/* Under session->lock: the file of the source, or of a sink. */
static struct file *file_of(struct omss_session *session, u64 id)
{
	struct omss_sink *sink;
	struct file *file;

	if (session->dead || !session->source.held)
		return ERR_PTR(-EINVAL);
	if (!id)
		return get_file(session->source.held);
	sink = id <= U32_MAX ? xa_load(&session->sinks, id) : NULL;
	file = sink ? omss_file(sink->member.sk) : NULL;
	return file ?: ERR_PTR(-ENOENT);
}

int omss_adopt(struct sock *sk, struct omss_adopt *call)
{
	struct omss_session *session;
	struct file *file, *held = NULL;
	int err;

	if (call->flags & ~OMSS_ATTACH || (call->flags && call->sink))
		return -EINVAL;
	session = omss_session_find(sk, call->session);
	if (IS_ERR(session))
		return PTR_ERR(session);
	mutex_lock(&session->lock);
	file = file_of(session, call->sink);
	err = PTR_ERR_OR_ZERO(file);
	if (err)
		goto out;
	err = omss_receive_fd(file);
	fput(file);
	if (err < 0)
		goto out;
	call->fd = err;
	err = 0;
	if (call->flags & OMSS_ATTACH) {
		swap(session->source.held, held);
		session->setup.flags &= ~OMSS_DETACHED;
	}
out:
	mutex_unlock(&session->lock);
	if (held)
		fput(held);
	omss_session_put(session);
	return err;
}
