// SPDX-License-Identifier: GPL-2.0-only
/* OMSS_GET_STATUS: counters and lists, in pages. */
#include <linux/jiffies.h>
#include <linux/uaccess.h>
#include <net/net_namespace.h>
#include "omss.h"

/* Where the records go. */
struct page_of {
	char __user *to;
	int room;
	u32 record;			/* bytes of each */
	u32 count;
};

void omss_add_counters(struct omss_counters *to, const struct omss_counters *from)
{
	unsigned int i;

	to->bytes += from->bytes;
	to->entries += from->entries;
	to->sends += from->sends;
	to->pages += from->pages;
	to->shared += from->shared;
	to->copied += from->copied;
	for (i = 0; i < OMSS_DROPS; i++)
		to->drops[i] += from->drops[i];
}

/* 1: there is no room for one more. */
static int append(struct page_of *page, const void *record)
{
	if (page->room < page->record)
		return 1;
	if (copy_to_user(page->to, record, page->record))
		return -EFAULT;
	page->to += page->record;
	page->room -= page->record;
	page->count++;
	return 0;
}

/* Under session->lock. */
static void describe_sink(struct omss_sink *sink, struct omss_sink_status *status)
{
	struct omss_session *session = sink->member.session;

	memset(status, 0, sizeof(*status));
	status->id = sink->id;
	status->session = session->id;
	status->service_class = sink->setup.service_class;
	status->join = sink->setup.join;
	status->on_lag = sink->setup.on_lag;
	status->lag_soft = sink->setup.lag_soft;
	status->lag_hard = sink->setup.lag_hard;
	mutex_lock(&sink->group->lock);
	status->state = sink->state;
	status->error = sink->error;
	status->blocked = sink->blocked;
	status->cursor = sink->cursor;
	status->lag = READ_ONCE(session->ring.head) - sink->cursor;
	if (sink->begun)
		status->left = sink->begun->bytes - sink->offset;
	status->quiet = jiffies_to_msecs(jiffies - sink->taken);
	status->sent = sink->sent;
	mutex_unlock(&sink->group->lock);
}

static bool done(const struct omss_sink_status *sink)
{
	return sink->state >= OMSS_SINK_FAILED ||
	       (!sink->left && (!sink->lag || sink->state != OMSS_SINK_STREAMING));
}

static void describe_ring(struct omss_ring *ring, struct omss_session_status *status)
{
	spin_lock(&ring->lock);
	status->head = ring->head;
	status->tail = ring->tail;
	status->memory = ring->memory;
	status->syncs = ring->syncs;
	spin_unlock(&ring->lock);
}

/* Under session->lock. */
static void describe_session(struct omss_session *session, struct omss_session_status *status)
{
	struct omss_sink_status sink_status;
	struct omss_sink *sink;
	unsigned long id;
	bool all = true;

	memset(status, 0, sizeof(*status));
	status->id = session->id;
	status->source = session->setup;
	status->received = READ_ONCE(session->received);
	status->sinks = session->count;
	status->namespace = sock_net(session->source.sk)->ns.inum;
	status->sent = session->gone;
	memcpy(status->dropped, session->dropped, sizeof(status->dropped));
	xa_for_each(&session->sinks, id, sink) {
		describe_sink(sink, &sink_status);
		omss_add_counters(&status->sent, &sink_status.sent);
		all = all && done(&sink_status);
	}
	describe_ring(&session->ring, status);
	status->state = OMSS_RUNNING;
	if (READ_ONCE(session->over)) {
		status->error = session->error;
		status->state = all ? OMSS_ENDED : OMSS_DRAINING;
	}
}

static int append_session(struct page_of *page, struct omss_session *session)
{
	struct omss_session_status status;
	int err = 0;

	mutex_lock(&session->lock);
	if (!session->dead) {
		describe_session(session, &status);
		err = append(page, &status);
	}
	mutex_unlock(&session->lock);
	return err;
}

static int list_sessions(struct sock *sk, const struct omss_request *request, struct page_of *page)
{
	bool everywhere = request->flags & OMSS_ALL_NAMESPACES;
	struct omss_session *session;
	u32 after = min_t(u64, request->after, U32_MAX);
	int err = 0;

	while (!err && (session = omss_session_next(after))) {
		const struct sock *source = session->source.sk;

		after = session->id;
		if (omss_may(source) && (everywhere || net_eq(sock_net(sk), sock_net(source))))
			err = append_session(page, session);
		omss_session_put(session);
	}
	return err;
}

static int list_sinks(struct omss_session *session, u64 after, struct page_of *page)
{
	struct omss_sink_status status;
	struct omss_sink *sink;
	unsigned long id;
	int err = 0;

	if (after >= U32_MAX)
		return 0;
	mutex_lock(&session->lock);
	xa_for_each_start(&session->sinks, id, sink, after + 1) {
		describe_sink(sink, &status);
		err = append(page, &status);
		if (err)
			break;
	}
	mutex_unlock(&session->lock);
	return err;
}

static int append_own_sink(struct omss_session *session, struct sock *sk, struct page_of *page)
{
	struct omss_sink_status status;
	struct omss_sink *sink;
	int err = -ENOENT;
	unsigned long id;

	mutex_lock(&session->lock);
	xa_for_each(&session->sinks, id, sink) {
		if (sink->member.sk != sk)
			continue;
		describe_sink(sink, &status);
		err = append(page, &status);
		break;
	}
	mutex_unlock(&session->lock);
	return err;
}

static int one_session(struct sock *sk, const struct omss_request *request, struct page_of *page)
{
	struct omss_session *session;
	int err;

	session = omss_session_find(sk, request->what == OMSS_SINK ? 0 : request->session);
	if (IS_ERR(session))
		return PTR_ERR(session);
	switch (request->what) {
	case OMSS_SESSION:
		err = append_session(page, session);
		if (!err && !page->count)
			err = -ENOENT;
		break;
	case OMSS_SINKS:
		err = list_sinks(session, request->after, page);
		break;
	default:
		err = append_own_sink(session, sk, page);
	}
	omss_session_put(session);
	return err;
}

/* How many bytes of records were written, or why none were. */
int omss_get_status(struct sock *sk, struct omss_request *request, char __user *to, int room)
{
	bool sinks = request->what == OMSS_SINK || request->what == OMSS_SINKS;
	u32 size = sinks ? sizeof(struct omss_sink_status) : sizeof(struct omss_session_status);
	struct page_of page = { .to = to, .room = room };
	int err;

	if (request->what > OMSS_SESSIONS || request->flags & ~OMSS_ALL_NAMESPACES)
		return -EINVAL;
	page.record = request->record ? min(request->record, size) : size;
	if (request->what == OMSS_SESSIONS)
		err = list_sessions(sk, request, &page);
	else
		err = one_session(sk, request, &page);
	if (err < 0)
		return err;
	request->record = page.record;
	request->count = page.count;
	return page.to - to;
}
