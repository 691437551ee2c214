// SPDX-License-Identifier: GPL-2.0-only
/*
 * Frozen: a filter takes nothing in, repair mode refuses the application's calls
 * and makes close(2) silent, a full flight lets no data out, and no timer runs.
 * All of it is the kernel's own state: nothing here refers to this module.
 */
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

void skoff_detach_filter(struct socket *sock)
{
	int unused = 0;

	if (rcu_access_pointer(sock->sk->sk_filter))
		sock_setsockopt(sock, SOL_SOCKET, SO_DETACH_FILTER,
				KERNEL_SOCKPTR(&unused), sizeof(unused));
}

/* Why this socket cannot be moved, or SKOFF_REASON_NONE. */
u32 skoff_refused(struct sock *sk)
{
	const struct tcp_sock *tp = tcp_sk(sk);

	if (sk_is_mptcp(sk))
		return SKOFF_REASON_MPTCP;
	if (!skoff_in(sk->sk_state, SKOFF_STATES))
		return SKOFF_REASON_STATE;
	if (inet_csk_has_ulp(sk))
		return SKOFF_REASON_ULP;
	if (skoff_is_signed(tp))
		return SKOFF_REASON_SIGNED;
	if (tp->urg_data || tp->snd_up != tp->snd_una)
		return SKOFF_REASON_URGENT;
	return SKOFF_REASON_NONE;
}

bool skoff_is_frozen(const struct sock *sk)
{
	return tcp_sk(sk)->repair;
}

void skoff_block(struct sock *sk)
{
	tcp_sk(sk)->retrans_out |= SKOFF_FULL;
}

void skoff_unblock(struct sock *sk)
{
	tcp_sk(sk)->retrans_out &= ~SKOFF_FULL;
}

static void cancel(struct sock *sk, struct hrtimer *timer)
{
	if (hrtimer_try_to_cancel(timer) == 1)
		__sock_put(sk); /* the timer's reference */
}

/* Stop all timers of the socket. */
void skoff_hush(struct sock *sk)
{
	inet_csk_clear_xmit_timers(sk);
	cancel(sk, &tcp_sk(sk)->pacing_timer);
	cancel(sk, &tcp_sk(sk)->compressed_ack_timer);
}

/*
 * icsk_probes_tstamp, unused while nothing is probed, keeps the moment: skoff_thaw()
 * takes the time between off the clock that the peer sees.
 */
void skoff_freeze(struct sock *sk)
{
	struct tcp_sock *tp = tcp_sk(sk);

	tp->repair = 1;
	tp->repair_queue = TCP_NO_QUEUE;
	sk->sk_reuse = SK_FORCE_REUSE;
	skoff_block(sk);
	skoff_hush(sk);
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
	if (tp->rcv_nxt != tp->rcv_wup) { /* the peer waits for an ACK, perhaps */
		inet_csk_schedule_ack(sk);
		inet_csk_reset_xmit_timer(sk, ICSK_TIME_DACK, 1, TCP_DELACK_MAX);
	}
}

/* Data that waits goes out when the lock is released (tcp_release_cb()). */
static void send_later(struct sock *sk)
{
	if (!tcp_write_queue_empty(sk) &&
	    !test_and_set_bit(TCP_TSQ_DEFERRED, &sk->sk_tsq_flags))
		sock_hold(sk);
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
		WRITE_ONCE(tp->tsoffset, tp->tsoffset -
			   (skoff_clock_ts(tp) - icsk->icsk_probes_tstamp));
	icsk->icsk_probes_tstamp = 0;
	tp->lsndtime = tcp_jiffies32;
	tp->rcv_tstamp = tcp_jiffies32;
	icsk->icsk_ack.lrcvtime = tcp_jiffies32;
	forget_send_times(sk);
	resume_timers(sk);
	send_later(sk);
}
