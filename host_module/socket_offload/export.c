// SPDX-License-Identifier: GPL-2.0-only
/* SKOFF_FREEZE_EXPORT: a live socket -> frozen, and a blob. */
#include <linux/filter.h>
#include <linux/tcp.h>
#include <linux/uaccess.h>
#include <net/inet_sock.h>
#include <net/ipv6.h>
#include "compat.h"
#include "socket_offload.h"

#define SKOFF_TRIES	8

static void export_ends(const struct sock *sk, struct skoff_snapshot *snapshot)
{
	const struct inet_sock *inet = inet_sk(sk);

	snapshot->local_port = ntohs(inet->inet_sport);
	snapshot->peer_port = ntohs(inet->inet_dport);
	snapshot->family = sk->sk_family;
	if (sk->sk_family == AF_INET6 && ipv6_addr_v4mapped(&sk->sk_v6_daddr)) {
		snapshot->flags |= SKOFF_MAPPED;
		snapshot->family = AF_INET;
	}
	if (snapshot->family == AF_INET) {
		memcpy(snapshot->local, &inet->inet_saddr, 4);
		memcpy(snapshot->peer, &inet->inet_daddr, 4);
#if IS_ENABLED(CONFIG_IPV6)
	} else {
		memcpy(snapshot->local, &inet6_sk(sk)->saddr, 16);
		memcpy(snapshot->peer, &sk->sk_v6_daddr, 16);
#endif
	}
}

static void export_negotiated(const struct tcp_sock *tp, struct skoff_snapshot *snapshot)
{
	const struct tcp_options_received *rx = &tp->rx_opt;

	if (rx->wscale_ok) {
		snapshot->flags |= SKOFF_WSCALE;
		snapshot->snd_wscale = rx->snd_wscale;
		snapshot->rcv_wscale = rx->rcv_wscale;
	}
	if (tcp_is_sack(tp))
		snapshot->flags |= SKOFF_SACK;
	if (tp->ecn_flags & TCP_ECN_OK)
		snapshot->flags |= SKOFF_ECN;
	snapshot->mss_clamp = rx->mss_clamp;
	snapshot->mss_cache = tp->mss_cache;
	snapshot->ts_recent_age = U32_MAX;
	if (!rx->tstamp_ok)
		return;
	snapshot->flags |= SKOFF_TIMESTAMPS;
	if (skoff_usec_ts(tp))
		snapshot->flags |= SKOFF_USEC_TS;
	snapshot->timestamp = skoff_clock_ts(tp) + tp->tsoffset;
	if (rx->ts_recent_stamp) {
		snapshot->ts_recent = rx->ts_recent;
		snapshot->ts_recent_age = ktime_get_seconds() - rx->ts_recent_stamp;
	}
}

static void export_sequences(const struct sock *sk, const struct skoff_lengths *lengths,
			     struct skoff_snapshot *snapshot)
{
	const struct tcp_sock *tp = tcp_sk(sk);

	snapshot->state = sk->sk_state;
	snapshot->snd_una = tp->snd_una;
	snapshot->copied_seq = tp->copied_seq;
	snapshot->segments = lengths->segments;
	snapshot->receive_length = lengths->receive;
	snapshot->unacked_length = lengths->unacked;
	snapshot->unsent_length = lengths->unsent;
	snapshot->snd_wl1 = tp->snd_wl1;
	snapshot->snd_wnd = tp->snd_wnd;
	snapshot->max_window = tp->max_window;
	snapshot->rcv_wnd = tp->rcv_wnd;
	snapshot->rcv_wup = tp->rcv_wup;
	if (skoff_in(sk->sk_state, SKOFF_FIN_SENT) && tp->snd_nxt != tp->write_seq)
		snapshot->flags |= SKOFF_FIN_UNSENT;
	if (skoff_in(sk->sk_state, SKOFF_FIN_RCVD) && tp->copied_seq == tp->rcv_nxt)
		snapshot->flags |= SKOFF_FIN_READ;
}

static int export_locked(struct sock *sk, struct skoff_export *call)
{
	u8 __user *user = u64_to_user_ptr(call->buffer);
	struct skoff_snapshot snapshot = { .size = sizeof(snapshot) };
	struct skoff_lengths lengths;
	u64 needed;

	skoff_measure(sk, &lengths);
	needed = sizeof(snapshot) + (u64)lengths.segments * sizeof(struct skoff_segment) +
		 lengths.receive + lengths.unacked + lengths.unsent + lengths.out_of_order;
	if (needed > call->length) {
		call->length = min_t(u64, needed, U32_MAX);
		return -ENOSPC;
	}
	export_ends(sk, &snapshot);
	export_negotiated(tcp_sk(sk), &snapshot);
	export_sequences(sk, &lengths, &snapshot);
	skoff_export_options(sk, &snapshot);
	skoff_export_warm(sk, &snapshot.warm);
	snapshot.flags |= SKOFF_WARM;
	if (copy_to_user(user, &snapshot, sizeof(snapshot)))
		return -EFAULT;
	call->length = needed;
	return skoff_copy_queues(sk, &lengths, user + sizeof(snapshot));
}

/*
 * A packet that passed before the filter was there may reach the socket while it is
 * exported: it waits in the backlog, belongs into the blob, and must not meet a
 * frozen socket.
 */
static int freeze_export(struct sock *sk, struct skoff_export *call)
{
	u32 room = call->length;
	int err, tries;

	for (tries = 0; tries < SKOFF_TRIES; tries++) {
		sk_flush_backlog(sk);
		call->reason = skoff_is_frozen(sk) ? SKOFF_REASON_FROZEN : skoff_refused(sk);
		if (call->reason)
			return -EOPNOTSUPP;
		call->length = room;
		skoff_freeze(sk);
		err = export_locked(sk, call);
		if (!err && !READ_ONCE(sk->sk_backlog.tail))
			return 0;
		skoff_thaw(sk);
		if (err)
			return err;
	}
	return -EBUSY;
}

int skoff_freeze_export(struct socket *sock, struct skoff_export *call)
{
	struct sock *sk = sock->sk;
	int err;

	if (rcu_access_pointer(sk->sk_filter) && call->filter >= 0 && !(call->flags & SKOFF_OWN)) {
		call->reason = SKOFF_REASON_FILTER;
		return -EOPNOTSUPP;
	}
	if (skoff_is_frozen(sk)) {
		call->reason = SKOFF_REASON_FROZEN;
		return -EOPNOTSUPP;
	}
	err = skoff_attach_filter(sock, call->filter);
	if (err)
		return err;
	lock_sock(sk);
	err = freeze_export(sk, call);
	if (err && call->filter >= 0 && call->reason != SKOFF_REASON_FROZEN)
		sk_detach_filter(sk);
	release_sock(sk);
	return err;
}
