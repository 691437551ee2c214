// SPDX-License-Identifier: GPL-2.0-only
/*
 * Frozen: a filter takes nothing in, repair mode refuses the application's calls
 * and makes close(2) silent, a full flight lets no data out, and no timer runs.
 * All of it is the kernel's own state: nothing here refers to this module.
 *
 * ICMP passes the filter. "Fragmentation needed" makes the MSS smaller and marks
 * what was too large as lost; it is sent again after the thaw. Whoever imports
 * the blob elsewhere learns the same from his own packets.
 */
#include <linux/math64.h>
#include <linux/tcp.h>
#include "compat.h"
#include "socket_offload.h"

int skoff_attach_filter(struct socket *sock, int filter)
{
	if (filter < 0)
		return 0;
	return sock_setsockopt(sock, SOL_SOCKET, SO_ATTACH_BPF,
			       KERNEL_SOCKPTR(&filter), sizeof(filter));
}

/* Why no connection can leave or enter this socket, or SKOFF_REASON_NONE. */
u32 skoff_unsuitable(struct sock *sk)
{
	if (sk_is_mptcp(sk))
		return SKOFF_REASON_MPTCP;
	/* A sockmap, and others, are no ULP, but sit on it too. */
	if (inet_csk_has_ulp(sk) || READ_ONCE(sk->sk_user_data))
		return SKOFF_REASON_ULP;
	if (skoff_is_signed(tcp_sk(sk)))
		return SKOFF_REASON_SIGNED;
	return SKOFF_REASON_NONE;
}

/* Why the connection in this socket cannot leave it, or SKOFF_REASON_NONE. */
u32 skoff_refused(struct sock *sk)
{
	const struct tcp_sock *tp = tcp_sk(sk);
	u32 reason = skoff_unsuitable(sk);

	if (reason)
		return reason;
	if (!skoff_in(sk->sk_state, SKOFF_STATES))
		return SKOFF_REASON_STATE;
	if (tp->urg_data || tp->snd_up != tp->snd_una)
		return SKOFF_REASON_URGENT;
	return SKOFF_REASON_NONE;
}

bool skoff_is_frozen(const struct sock *sk)
{
	return tcp_sk(sk)->repair;
}

/*
 * Linux 6.1 lets a FIN go though the flight is full (tcp_cwnd_test()): one that
 * waits is none until the thaw.
 */
static void mark_waiting_fin(struct sock *sk, bool fin)
{
	struct sk_buff *last = tcp_write_queue_tail(sk);

	if (!last || !skoff_in(sk->sk_state, SKOFF_FIN_SENT))
		return;
	if (fin)
		TCP_SKB_CB(last)->tcp_flags |= TCPHDR_FIN;
	else
		TCP_SKB_CB(last)->tcp_flags &= ~TCPHDR_FIN;
}

static void block(struct sock *sk)
{
	tcp_sk(sk)->retrans_out |= SKOFF_FULL;
	mark_waiting_fin(sk, false);
}

void skoff_unblock(struct sock *sk)
{
	tcp_sk(sk)->retrans_out &= ~SKOFF_FULL;
	mark_waiting_fin(sk, true);
}

static void cancel(struct sock *sk, struct hrtimer *timer)
{
	if (hrtimer_try_to_cancel(timer) == 1)
		__sock_put(sk); /* the timer's reference */
}

/*
 * Stop all timers of the socket, and what would start one again: an ICMP error that
 * takes a backoff back (tcp_ld_RTO_revert()), and ACKs that one of them had put off until
 * the lock is released (tcp_delack_timer_handler()).
 */
static void hush(struct sock *sk)
{
	struct tcp_sock *tp = tcp_sk(sk);

	inet_csk_clear_xmit_timers(sk);
	cancel(sk, &tp->pacing_timer);
	cancel(sk, &tp->compressed_ack_timer);
	tp->compressed_ack = 0;
	inet_csk(sk)->icsk_backoff = 0;
}

/*
 * icsk_probes_tstamp, unused while nothing is probed, keeps the moment: skoff_thaw()
 * takes the time between off all clocks.
 */
void skoff_freeze(struct sock *sk)
{
	struct tcp_sock *tp = tcp_sk(sk);

	tp->repair = 1;
	tp->repair_queue = TCP_NO_QUEUE;
	sk->sk_reuse = SK_FORCE_REUSE;
	block(sk);
	hush(sk);
	inet_csk(sk)->icsk_probes_tstamp = skoff_clock_ts(tp) ?: 1;
}

/* What was sent before is no measure of the path any more (Karn's rule). */
static void forget_send_times(struct sock *sk)
{
	struct sk_buff *skb = tcp_rtx_queue_head(sk);

	skb_rbtree_walk_from(skb)
		TCP_SKB_CB(skb)->sacked |= TCPCB_REPAIRED;
}

static void resume_timers(struct sock *sk)
{
	struct inet_connection_sock *icsk = inet_csk(sk);
	struct tcp_sock *tp = tcp_sk(sk);

	if (tp->packets_out)
		inet_csk_reset_xmit_timer(sk, ICSK_TIME_RETRANS, icsk->icsk_rto, TCP_RTO_MAX);
	else if (!tcp_write_queue_empty(sk))
		inet_csk_reset_xmit_timer(sk, ICSK_TIME_PROBE0, icsk->icsk_rto, TCP_RTO_MAX);
	if (sock_flag(sk, SOCK_KEEPOPEN) && skoff_in(sk->sk_state, SKOFF_STATES))
		inet_csk_reset_keepalive_timer(sk, keepalive_time_when(tp));
	/* The peer waits for an ACK, perhaps. */
	if (tp->rcv_nxt != tp->rcv_wup || !RB_EMPTY_ROOT(&tp->out_of_order_queue)) {
		inet_csk_schedule_ack(sk);
		inet_csk_reset_xmit_timer(sk, ICSK_TIME_DACK, 1, TCP_DELACK_MAX);
	}
}

/* Data that waits, or was lost, goes out when the lock is released (tcp_release_cb()). */
static void send_later(struct sock *sk)
{
	if ((!tcp_write_queue_empty(sk) || tcp_sk(sk)->lost_out) &&
	    !test_and_set_bit(TCP_TSQ_DEFERRED, &sk->sk_tsq_flags))
		sock_hold(sk);
}

/*
 * So much time (of skoff_clock_ts()) has not passed: not for the peer, nor for what
 * gives up or grows with time.
 */
static void skip(struct sock *sk, u32 time)
{
	struct tcp_sock *tp = tcp_sk(sk);
	u64 us = skoff_ts_to_us(tp, time);

	WRITE_ONCE(tp->tsoffset, tp->tsoffset - time);
	if (tp->retrans_stamp)
		tp->retrans_stamp = (tp->retrans_stamp + time) ?: 1;
	skoff_shift_congestion(sk, div_u64(us * HZ, USEC_PER_SEC), us);
}

void skoff_thaw(struct sock *sk)
{
	struct inet_connection_sock *icsk = inet_csk(sk);
	struct tcp_sock *tp = tcp_sk(sk);

	tp->repair = 0;
	tp->repair_queue = TCP_NO_QUEUE;
	if (sk->sk_reuse == SK_FORCE_REUSE)
		sk->sk_reuse = SK_CAN_REUSE;
	skoff_unblock(sk);
	if (icsk->icsk_probes_tstamp)
		skip(sk, skoff_clock_ts(tp) - icsk->icsk_probes_tstamp);
	icsk->icsk_probes_tstamp = 0;
	tp->lsndtime = tcp_jiffies32;
	tp->rcv_tstamp = tcp_jiffies32;
	icsk->icsk_ack.lrcvtime = tcp_jiffies32;
	forget_send_times(sk);
	resume_timers(sk);
	send_later(sk);
}
