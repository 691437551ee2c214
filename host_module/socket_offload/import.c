// SPDX-License-Identifier: GPL-2.0-only
/* SKOFF_IMPORT: a blob -> a frozen connection, in a new socket or in one that is held already. */
#include <linux/fcntl.h>
#include <linux/in.h>
#include <linux/in6.h>
#include <linux/tcp.h>
#include <linux/uaccess.h>
#include <net/inet_sock.h>
#include <net/ipv6.h>
#include "compat.h"
#include "socket_offload.h"

struct blob {
	struct skoff_snapshot snapshot;
	const u8 __user *segments, *receive, *unacked, *unsent, *out_of_order;
	u32 out_of_order_length;
};

union address {
	struct sockaddr any;
	struct sockaddr_in in;
	struct sockaddr_in6 in6;
};

/* What no kernel would have written. The caller has looked at it too; neither relies on the other. */
static bool contradicts_itself(const struct skoff_snapshot *s)
{
	u32 fin, rcv_nxt;

	if (s->state >= TCP_MAX_STATES || !skoff_in(s->state, SKOFF_STATES))
		return true;
	fin = skoff_in(s->state, SKOFF_FIN_RCVD);
	rcv_nxt = s->copied_seq + s->receive_length + (fin && !(s->flags & SKOFF_FIN_READ));
	if (s->flags & ~SKOFF_KNOWN_FLAGS || s->upper_length)
		return true;
	if (s->family != AF_INET && s->family != AF_INET6)
		return true;
	if (s->family == AF_INET6 && s->flags & SKOFF_MAPPED)
		return true;
	if (!s->local_port || !s->peer_port)
		return true;
	if (s->snd_wscale > TCP_MAX_WSCALE || s->rcv_wscale > TCP_MAX_WSCALE)
		return true;
	if (s->mss_clamp < TCP_MIN_SND_MSS || s->mss_clamp > U16_MAX || s->mss_cache > U16_MAX)
		return true;
	if (s->flags & SKOFF_FIN_UNSENT && !skoff_in(s->state, SKOFF_FIN_SENT))
		return true;
	if (s->flags & SKOFF_FIN_READ && (!fin || s->receive_length))
		return true;
	if (s->unsent_length && skoff_in(s->state, TCPF_FIN_WAIT2))
		return true;
	if (s->unacked_length && skoff_in(s->state, TCPF_FIN_WAIT2))
		return true;
	if (s->unsent_length && skoff_in(s->state, SKOFF_FIN_SENT) && !(s->flags & SKOFF_FIN_UNSENT))
		return true;
	if (fin && s->segments)
		return true;
	if (s->max_window < s->snd_wnd || s->max_window > (1U << 30) || s->rcv_wnd > (1U << 30))
		return true;
	if (after(s->snd_wl1, rcv_nxt + s->rcv_wnd) || after(s->rcv_wup, rcv_nxt))
		return true;
	if (memchr(s->congestion, 0, sizeof(s->congestion)) == NULL)
		return true;
	return s->send_buffer > INT_MAX / 2 || s->receive_buffer > INT_MAX / 2;
}

/* Why the blob cannot be imported; 0 if it can. */
static u32 unknown_or_wrong(const struct skoff_snapshot *s)
{
	if (s->upper_layer != SKOFF_UPPER_NONE)
		return SKOFF_REASON_ULP;
	return contradicts_itself(s) ? SKOFF_REASON_BLOB : SKOFF_REASON_NONE;
}

static int read_blob(struct blob *blob, const struct skoff_import *call)
{
	const u8 __user *user = u64_to_user_ptr(call->buffer);
	struct skoff_snapshot *s = &blob->snapshot;
	u64 fixed;
	u32 size;
	int err;

	if (call->length < sizeof(u32) || get_user(size, (u32 __user *)user))
		return call->length < sizeof(u32) ? -EINVAL : -EFAULT;
	if (size > call->length)
		return -EINVAL;
	err = copy_struct_from_user(s, sizeof(*s), user, size);
	if (err)
		return err;
	fixed = size + (u64)s->segments * sizeof(struct skoff_segment) +
		s->receive_length + (u64)s->unacked_length + s->unsent_length;
	if (s->segments > SKOFF_MAX_SEGMENTS || call->length > SKOFF_MAX_QUEUE + SZ_64K ||
	    fixed > call->length || s->receive_length > SKOFF_MAX_QUEUE ||
	    s->unacked_length > SKOFF_MAX_QUEUE || s->unsent_length > SKOFF_MAX_QUEUE)
		return -EINVAL;
	blob->segments = user + size;
	blob->receive = blob->segments + s->segments * sizeof(struct skoff_segment);
	blob->unacked = blob->receive + s->receive_length;
	blob->unsent = blob->unacked + s->unacked_length;
	blob->out_of_order = blob->unsent + s->unsent_length;
	blob->out_of_order_length = call->length - fixed;
	return 0;
}

static int make_address(union address *address, int family, const struct skoff_snapshot *s,
			const u8 *bytes, u16 port)
{
	if (family == AF_INET) {
		address->in = (struct sockaddr_in) {
			.sin_family = AF_INET, .sin_port = htons(port),
		};
		memcpy(&address->in.sin_addr, bytes, 4);
		return sizeof(address->in);
	}
	address->in6 = (struct sockaddr_in6) {
		.sin6_family = AF_INET6, .sin6_port = htons(port),
	};
	if (s->family == AF_INET) {
		address->in6.sin6_addr.s6_addr16[5] = htons(0xffff);
		memcpy(&address->in6.sin6_addr.s6_addr32[3], bytes, 4);
	} else {
		memcpy(&address->in6.sin6_addr, bytes, 16);
	}
	return sizeof(address->in6);
}

/* Whether the socket stands at these ends (of the wire). */
static bool stands_at(const struct sock *sk, const struct skoff_snapshot *s, const u8 *local, u16 port)
{
	const struct inet_sock *inet = inet_sk(sk);

	if (ntohs(inet->inet_sport) != port || ntohs(inet->inet_dport) != s->peer_port)
		return false;
#if IS_ENABLED(CONFIG_IPV6)
	if (s->family == AF_INET6)
		return sk->sk_family == AF_INET6 &&
		       !memcmp(&inet6_sk(sk)->saddr, local, 16) &&
		       !memcmp(&sk->sk_v6_daddr, s->peer, 16);
#endif
	return !memcmp(&inet->inet_saddr, local, 4) && !memcmp(&inet->inet_daddr, s->peer, 4);
}

/* An established place-holder that says and holds nothing: it needs no rebuilding. */
static bool is_empty(const struct sock *sk)
{
	const struct tcp_sock *tp = tcp_sk(sk);

	return sk->sk_state == TCP_ESTABLISHED && tcp_rtx_and_write_queues_empty(sk) &&
	       skb_queue_empty(&sk->sk_receive_queue) && tp->copied_seq == tp->rcv_nxt &&
	       RB_EMPTY_ROOT(&tp->out_of_order_queue);
}

static void set_sequences(struct sock *sk, const struct skoff_snapshot *s)
{
	struct tcp_sock *tp = tcp_sk(sk);

	WRITE_ONCE(tp->write_seq, s->snd_una);
	WRITE_ONCE(tp->snd_una, s->snd_una);
	WRITE_ONCE(tp->snd_nxt, s->snd_una);
	tp->snd_sml = s->snd_una;
	tp->snd_up = s->snd_una;
	tp->pushed_seq = s->snd_una;
	WRITE_ONCE(tp->rcv_nxt, s->copied_seq);
	WRITE_ONCE(tp->copied_seq, s->copied_seq);
	tp->rcv_wup = s->copied_seq;
}

/* The route is looked up with it. */
static void set_mark(struct sock *sk, u32 mark)
{
	if (sk->sk_mark == mark)
		return;
	WRITE_ONCE(sk->sk_mark, mark);
	sk_dst_reset(sk);
}

static int disconnect(struct socket *sock)
{
	struct sock *sk = sock->sk;
	int err = sk->sk_prot->disconnect(sk, 0);

	if (err)
		return err;
	sock->state = SS_UNCONNECTED;
	xchg(&sk->sk_err, 0); /* ECONNABORTED, of our own doing */
	return 0;
}

/* A closed socket that connects as what the snapshot says; nothing is sent (tcp_connect()). */
static int close_for_import(struct socket *sock, const struct skoff_snapshot *s)
{
	struct sock *sk = sock->sk;
	struct tcp_sock *tp = tcp_sk(sk);
	int err = sk->sk_state == TCP_CLOSE ? 0 : disconnect(sock);

	if (err)
		return err;
	tp->repair = 1;
	tp->repair_queue = TCP_NO_QUEUE;
	sk->sk_reuse = SK_FORCE_REUSE;
	set_sequences(sk, s);
	tp->rx_opt.user_mss = max_t(u32, s->mss_clamp, TCP_MIN_MSS);
	set_mark(sk, s->mark);
	return 0;
}

static int bind_and_connect(struct socket *sock, const struct skoff_snapshot *s,
			    const u8 *local, u16 port)
{
	int family = sock->sk->sk_family, length, err;
	union address address;

	length = make_address(&address, family, s, local, port);
	err = kernel_bind(sock, &address.any, length);
	if (err && !(err == -EINVAL && inet_sk(sock->sk)->inet_num == port))
		return err; /* one that was restored before is bound still */
	length = make_address(&address, family, s, s->peer, s->peer_port);
	err = kernel_connect(sock, &address.any, length, O_NONBLOCK);
	return err == -EINPROGRESS ? -EBUSY : err; /* somebody has thawed it meanwhile */
}

static int set_negotiated(struct sock *sk, const struct skoff_snapshot *s)
{
	struct tcp_sock *tp = tcp_sk(sk);
	struct tcp_options_received *rx = &tp->rx_opt;
	int options = s->flags & SKOFF_TIMESTAMPS ? TCPOLEN_TSTAMP_ALIGNED : 0;

	rx->wscale_ok = !!(s->flags & SKOFF_WSCALE);
	rx->snd_wscale = rx->wscale_ok ? s->snd_wscale : 0;
	rx->rcv_wscale = rx->wscale_ok ? s->rcv_wscale : 0;
	rx->sack_ok = s->flags & SKOFF_SACK ? TCP_SACK_SEEN : 0;
	rx->tstamp_ok = !!(s->flags & SKOFF_TIMESTAMPS);
	rx->mss_clamp = s->mss_clamp;
	/* connect() took this machine's options for granted. */
	tp->mss_cache -= options - (int)(tp->tcp_header_len - sizeof(struct tcphdr));
	tp->tcp_header_len = sizeof(struct tcphdr) + options;
	if (s->mss_cache)
		tp->mss_cache = clamp_t(u32, s->mss_cache, TCP_MIN_MSS, tp->mss_cache);
	tp->ecn_flags = s->flags & SKOFF_ECN ? TCP_ECN_OK : 0;
	if (!rx->tstamp_ok)
		return 0;
	if (!skoff_set_usec_ts(tp, s->flags & SKOFF_USEC_TS))
		return -EOPNOTSUPP;
	WRITE_ONCE(tp->tsoffset, s->timestamp - skoff_clock_ts(tp));
	rx->saw_tstamp = 0;
	rx->ts_recent_stamp = 0;
	if (s->ts_recent_age != U32_MAX) {
		rx->ts_recent = s->ts_recent;
		rx->ts_recent_stamp = max_t(time64_t, ktime_get_seconds() - s->ts_recent_age, 1);
	}
	return 0;
}

static void set_window(struct sock *sk, const struct skoff_snapshot *s)
{
	struct tcp_sock *tp = tcp_sk(sk);

	tp->snd_wl1 = s->snd_wl1;
	tp->snd_wnd = s->snd_wnd;
	tp->max_window = s->max_window;
	tp->rcv_wnd = s->rcv_wnd;
	tp->rcv_wup = s->rcv_wup;
	tp->pred_flags = 0; /* the slow path decides when the fast one is safe */
}

/* As tcp_fin() does, but for the ACK. */
static int receive_fin(struct sock *sk, const struct skoff_snapshot *s)
{
	int err = s->flags & SKOFF_FIN_READ ? 0 : skoff_fill_fin(sk);

	if (err)
		return err;
	WRITE_ONCE(sk->sk_shutdown, sk->sk_shutdown | RCV_SHUTDOWN);
	sock_set_flag(sk, SOCK_DONE);
	tcp_sk(sk)->rx_opt.num_sacks = 0;
	return 0;
}

/*
 * Bytes and our FIN, as sent or as waiting. tcp_shutdown() makes the FIN. Without a
 * window nothing leaves meanwhile.
 */
static int fill_send_queue(struct sock *sk, const struct blob *blob)
{
	const struct skoff_snapshot *s = &blob->snapshot;
	struct tcp_sock *tp = tcp_sk(sk);
	bool fin = skoff_in(s->state, SKOFF_FIN_SENT);
	int err;

	tp->snd_wnd = 0;
	tp->repair_queue = TCP_SEND_QUEUE;
	err = skoff_fill_send(sk, blob->unacked, s->unacked_length);
	if (!err && fin && !(s->flags & SKOFF_FIN_UNSENT))
		sk->sk_prot->shutdown(sk, SEND_SHUTDOWN);
	tp->repair_queue = TCP_NO_QUEUE;
	if (err || !(s->unsent_length || s->flags & SKOFF_FIN_UNSENT))
		return err;
	tp->repair = 0;
	err = skoff_fill_send(sk, blob->unsent, s->unsent_length);
	if (!err && fin)
		sk->sk_prot->shutdown(sk, SEND_SHUTDOWN);
	tp->repair = 1;
	return err;
}

/* The states in which one side or both have said their last. */
static int set_state(struct sock *sk, const struct blob *blob)
{
	const struct skoff_snapshot *s = &blob->snapshot;
	int err = 0;

	if (skoff_in(s->state, SKOFF_FIN_RCVD))
		err = receive_fin(sk, s);
	if (!err && skoff_in(s->state, TCPF_CLOSE_WAIT | TCPF_LAST_ACK))
		tcp_set_state(sk, TCP_CLOSE_WAIT);
	if (!err)
		err = fill_send_queue(sk, blob);
	if (err)
		return err;
	if (skoff_in(s->state, SKOFF_FIN_SENT | TCPF_FIN_WAIT2))
		WRITE_ONCE(sk->sk_shutdown, sk->sk_shutdown | SEND_SHUTDOWN);
	if (sk->sk_state != s->state)
		tcp_set_state(sk, s->state);
	return 0;
}

/* A connected, frozen, empty socket becomes what the blob says. */
static int fill(struct sock *sk, const struct blob *blob, u32 *reason)
{
	const struct skoff_snapshot *s = &blob->snapshot;
	int err;

	set_sequences(sk, s);
	set_mark(sk, s->mark);
	skoff_unblock(sk);
	err = set_negotiated(sk, s);
	if (err) {
		*reason = SKOFF_REASON_CLOCK;
		return err;
	}
	skoff_import_buffers(sk, s);
	set_window(sk, s);
	err = skoff_fill_receive(sk, blob->receive, s->receive_length) ?:
	      skoff_fill_segments(sk, blob->segments, blob->out_of_order,
				  s->segments, blob->out_of_order_length) ?:
	      set_state(sk, blob);
	if (err)
		return err;
	set_window(sk, s);
	if (s->flags & SKOFF_WARM)
		skoff_import_warm(sk, s);
	return 0;
}

static void wake(struct sock *sk)
{
	if (!skb_queue_empty(&sk->sk_receive_queue) || sk->sk_shutdown & RCV_SHUTDOWN)
		sk->sk_data_ready(sk);
}

/* A half-filled socket is no connection: it closes, silently, and has no privilege left. */
static void give_up(struct socket *sock)
{
	struct sock *sk = sock->sk;

	tcp_sk(sk)->repair = 1;
	disconnect(sock);
	tcp_sk(sk)->repair = 0;
	sk->sk_reuse = SK_CAN_REUSE;
}

/* Why the socket cannot take a connection; 0 if it can. */
static u32 unfit(struct sock *sk, const struct skoff_snapshot *s)
{
	u32 reason = skoff_unsuitable(sk);

	if (reason)
		return reason;
	if (s->family == AF_INET6 && sk->sk_family != AF_INET6)
		return SKOFF_REASON_BLOB;
	if (sk->sk_state == TCP_CLOSE)
		return SKOFF_REASON_NONE;
	if (!skoff_is_frozen(sk))
		return SKOFF_REASON_FROZEN;
	return skoff_in(sk->sk_state, SKOFF_STATES) ? SKOFF_REASON_NONE : SKOFF_REASON_STATE;
}

static int rebuild(struct socket *sock, const struct skoff_import *call, const struct blob *blob,
		   const u8 *local, u16 port)
{
	const struct skoff_snapshot *s = &blob->snapshot;
	struct sock *sk = sock->sk;
	int err = 0;

	if (call->flags & SKOFF_OPTIONS)
		err = skoff_import_options(sock, s);
	if (err)
		return err;
	lock_sock(sk);
	if (unfit(sk, s))
		err = -EBUSY; /* somebody else is at it too */
	else
		err = close_for_import(sock, s);
	release_sock(sk);
	if (err)
		return err;
	err = bind_and_connect(sock, s, local, port);
	if (!err)
		return 0;
	lock_sock(sk);
	if (skoff_is_frozen(sk) && sk->sk_state == TCP_CLOSE)
		give_up(sock);
	release_sock(sk);
	return err;
}

/* Connected at these ends, frozen and empty: it can be filled. */
static bool stands_ready(struct sock *sk, const struct skoff_snapshot *s, const u8 *local, u16 port)
{
	return skoff_is_frozen(sk) && !skoff_unsuitable(sk) && is_empty(sk) && stands_at(sk, s, local, port);
}

static int fill_or_give_up(struct socket *sock, const struct blob *blob, u32 *reason)
{
	int err = fill(sock->sk, blob, reason);

	if (err) {
		give_up(sock);
		return err;
	}
	skoff_freeze(sock->sk);
	wake(sock->sk);
	return 0;
}

int skoff_import_into(struct socket *sock, struct skoff_import *call)
{
	struct sock *sk = sock->sk;
	struct blob *blob = kzalloc(sizeof(*blob), GFP_KERNEL);
	const struct skoff_snapshot *s = &blob->snapshot;
	const u8 *local;
	bool ready;
	u16 port;
	int err;

	if (!blob)
		return -ENOMEM;
	err = read_blob(blob, call);
	if (err)
		goto out;
	local = call->flags & SKOFF_BIND ? call->local : s->local;
	port = call->flags & SKOFF_BIND ? call->local_port : s->local_port;
	err = -EOPNOTSUPP;
	call->reason = unknown_or_wrong(s) ?: unfit(sk, s);
	if (call->reason)
		goto out;
	err = skoff_attach_filter(sock, call->filter);
	if (err)
		goto out;

	lock_sock(sk);
	ready = stands_ready(sk, s, local, port);
	release_sock(sk);
	if (!ready)
		err = rebuild(sock, call, blob, local, port);
	if (err)
		goto out;

	lock_sock(sk);
	err = stands_ready(sk, s, local, port) ? fill_or_give_up(sock, blob, &call->reason) : -EBUSY;
	release_sock(sk);
out:
	kfree(blob);
	return err;
}
