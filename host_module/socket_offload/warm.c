// SPDX-License-Identifier: GPL-2.0-only
/*
 * The warm state: what the connection has learnt about its path. A congestion
 * control's private state travels where both ends run one whose layout and clocks we
 * know: reno has none, cubic and bbr have the same from 4.20 to 6.12. Any
 * other starts anew with the window and the threshold that it had.
 */
#include <linux/math64.h>
#include <linux/sizes.h>
#include <linux/tcp.h>
#include <linux/win_minmax.h>
#include "socket_offload.h"

/* The beginning of struct bictcp, net/ipv4/tcp_cubic.c. */
struct cubic {
	u32 cnt;
	u32 last_max_cwnd;
	u32 last_cwnd;
	u32 last_time;		/* jiffies */
	u32 bic_origin_point;
	u32 bic_K;
	u32 delay_min;
	u32 epoch_start;	/* jiffies; 0: no epoch */
	u32 ack_cnt;
	u32 tcp_cwnd;
	u16 unused;
	u8 sample_cnt;
	u8 found;
	u32 round_start;	/* microseconds */
	u32 end_seq;
	u32 last_ack;		/* microseconds */
	u32 curr_rtt;
};

/* The beginning of struct bbr, net/ipv4/tcp_bbr.c. */
struct bbr {
	u32 min_rtt_us;
	u32 min_rtt_stamp;	/* jiffies */
	u32 probe_rtt_done_stamp; /* jiffies; 0: not set */
	struct minmax bw;
	u32 rtt_cnt;
	u32 next_rtt_delivered;
	u64 cycle_mstamp;	/* microseconds */
	u32 bits[1];		/* the lowest three: mode, 0 to 3 */
	u32 lt_bw;
	u32 lt_last_delivered;
	u32 lt_last_stamp;	/* milliseconds */
	u32 lt_last_lost;
	u32 gains;
	u32 prior_cwnd;
	u32 full_bw;
	u64 ack_epoch_mstamp;	/* microseconds */
};

static u64 clock_us(void)
{
	return div_u64(tcp_clock_ns(), NSEC_PER_USEC);
}

void skoff_export_warm(struct sock *sk, struct skoff_warm *warm)
{
	const struct inet_connection_sock *icsk = inet_csk(sk);
	const struct tcp_sock *tp = tcp_sk(sk);

	warm->snd_cwnd = tcp_snd_cwnd(tp);
	warm->snd_ssthresh = tp->snd_ssthresh;
	warm->snd_cwnd_cnt = tp->snd_cwnd_cnt;
	warm->srtt_us = tp->srtt_us;
	warm->mdev_us = tp->mdev_us;
	warm->mdev_max_us = tp->mdev_max_us;
	warm->rttvar_us = tp->rttvar_us;
	warm->rto_us = jiffies_to_usecs(icsk->icsk_rto);
	warm->min_rtt_us = tcp_min_rtt(tp);
	warm->reordering = tp->reordering;
	warm->rate_delivered = tp->rate_delivered;
	warm->rate_interval_us = tp->rate_interval_us;
	warm->rate_app_limited = tp->rate_app_limited;
	warm->delivered = tp->delivered;
	warm->lost = tp->lost;
	warm->rcv_ssthresh = tp->rcv_ssthresh;
	warm->window_clamp = tp->window_clamp;
	warm->rcvq_space = tp->rcvq_space.space;
	warm->rcv_rtt_us = tp->rcv_rtt_est.rtt_us;
	warm->ca_state = icsk->icsk_ca_state;
	warm->ca_hz = HZ;
	warm->ca_jiffies = tcp_jiffies32;
	warm->ca_clock_us = clock_us();
	warm->pacing_rate = READ_ONCE(sk->sk_pacing_rate);
	warm->bytes_acked = tp->bytes_acked;
	BUILD_BUG_ON(sizeof(icsk->icsk_ca_priv) > sizeof(warm->ca_private));
	memcpy(warm->ca_private, icsk->icsk_ca_priv, sizeof(icsk->icsk_ca_priv));
}

static void import_rtt(struct sock *sk, const struct skoff_warm *warm)
{
	struct inet_connection_sock *icsk = inet_csk(sk);
	struct tcp_sock *tp = tcp_sk(sk);

	if (!warm->srtt_us)
		return;
	tp->srtt_us = warm->srtt_us;
	tp->mdev_us = warm->mdev_us;
	tp->mdev_max_us = warm->mdev_max_us;
	tp->rttvar_us = max(warm->rttvar_us, tcp_rto_min_us(sk));
	tp->rtt_seq = tp->snd_nxt;
	icsk->icsk_rto = clamp_t(u32, usecs_to_jiffies(warm->rto_us), tcp_rto_min(sk), TCP_RTO_MAX);
	if (warm->min_rtt_us && warm->min_rtt_us != ~0U)
		minmax_reset(&tp->rtt_min, tcp_jiffies32, warm->min_rtt_us);
}

/* What recovery would still have taken away is taken away now: its marks did not travel. */
static u32 window_of(const struct skoff_warm *warm)
{
	u32 window = clamp_t(u32, warm->snd_cwnd, 1, SZ_1M);

	if (warm->ca_state == TCP_CA_CWR || warm->ca_state == TCP_CA_Recovery)
		window = min(window, max(warm->snd_ssthresh, 2U));
	return window;
}

static void import_window(struct sock *sk, const struct skoff_warm *warm)
{
	struct tcp_sock *tp = tcp_sk(sk);

	tcp_snd_cwnd_set(tp, min(window_of(warm), tp->snd_cwnd_clamp));
	tp->snd_ssthresh = max(warm->snd_ssthresh, 2U);
	tp->snd_cwnd_cnt = min(warm->snd_cwnd_cnt, tcp_snd_cwnd(tp));
	tp->snd_cwnd_stamp = tcp_jiffies32;
	tp->reordering = clamp_t(u32, warm->reordering, TCP_FASTRETRANS_THRESH, 300);
}

static void import_rate(struct sock *sk, const struct skoff_warm *warm)
{
	struct tcp_sock *tp = tcp_sk(sk);

	tp->rate_delivered = warm->rate_delivered;
	tp->rate_interval_us = warm->rate_interval_us;
	tp->rate_app_limited = !!warm->rate_app_limited;
	tp->delivered = warm->delivered;
	tp->lost = warm->lost;
	tp->app_limited = 0;
	tp->bytes_acked = warm->bytes_acked;
	if (warm->pacing_rate)
		WRITE_ONCE(sk->sk_pacing_rate, min_t(u64, warm->pacing_rate,
						     READ_ONCE(sk->sk_max_pacing_rate)));
}

static void import_receiver(struct sock *sk, const struct skoff_warm *warm)
{
	struct tcp_sock *tp = tcp_sk(sk);

	if (warm->window_clamp)
		WRITE_ONCE(tp->window_clamp, min(max(warm->window_clamp, tp->window_clamp), U32_MAX >> 2));
	tp->rcv_ssthresh = max(tp->rcv_ssthresh, min(warm->rcv_ssthresh, tp->window_clamp));
	tp->rcvq_space.space = clamp_t(u32, warm->rcvq_space, TCP_INIT_CWND * TCP_MSS_DEFAULT, SZ_64M);
	tp->rcv_rtt_est.rtt_us = warm->rcv_rtt_us;
}

/* Room for the whole window at once, as tcp_sndbuf_expand() would have made it by now. */
static void expand_send_buffer(struct sock *sk)
{
	const struct tcp_sock *tp = tcp_sk(sk);
	u32 per_mss = max_t(u32, tp->rx_opt.mss_clamp, tp->mss_cache) + MAX_TCP_HEADER +
		      SKB_DATA_ALIGN(sizeof(struct skb_shared_info));
	u64 wanted;

	if (sk->sk_userlocks & SOCK_SNDBUF_LOCK)
		return;
	per_mss = roundup_pow_of_two(per_mss) + SKB_DATA_ALIGN(sizeof(struct sk_buff));
	wanted = 2ULL * per_mss * max_t(u32, tcp_snd_cwnd(tp), TCP_INIT_CWND);
	wanted = min_t(u64, wanted, READ_ONCE(sock_net(sk)->ipv4.sysctl_tcp_wmem[2]));
	if (sk->sk_sndbuf < wanted)
		WRITE_ONCE(sk->sk_sndbuf, wanted);
}

/* Both clocks of the machine that it comes from become ours. */
static void shift_cubic(struct cubic *cubic, u32 jiffies_by, u32 us_by)
{
	cubic->last_time += jiffies_by;
	if (cubic->epoch_start)
		cubic->epoch_start = (cubic->epoch_start + jiffies_by) ?: 1;
	cubic->round_start += us_by;
	cubic->last_ack += us_by;
	cubic->cnt = max(cubic->cnt, 1U); /* a divisor */
	cubic->ack_cnt = min(cubic->ack_cnt, SZ_1M); /* counted down in a loop */
}

static void shift_bbr(struct bbr *bbr, u32 jiffies_by, u64 us_by)
{
	bbr->min_rtt_stamp += jiffies_by;
	if (bbr->probe_rtt_done_stamp)
		bbr->probe_rtt_done_stamp = (bbr->probe_rtt_done_stamp + jiffies_by) ?: 1;
	bbr->cycle_mstamp += us_by;
	bbr->ack_epoch_mstamp += us_by;
	bbr->lt_last_stamp += div_s64((s64)us_by, USEC_PER_MSEC);
}

/* The congestion control's clocks go on from a moment that was so long ago. */
void skoff_shift_congestion(struct sock *sk, u32 jiffies_by, u64 us_by)
{
	struct inet_connection_sock *icsk = inet_csk(sk);

	if (!strcmp(icsk->icsk_ca_ops->name, "cubic"))
		shift_cubic((struct cubic *)icsk->icsk_ca_priv, jiffies_by, us_by);
	else if (!strcmp(icsk->icsk_ca_ops->name, "bbr"))
		shift_bbr((struct bbr *)icsk->icsk_ca_priv, jiffies_by, us_by);
}

static void import_private(struct sock *sk, const struct skoff_snapshot *snapshot)
{
	struct inet_connection_sock *icsk = inet_csk(sk);
	const struct skoff_warm *warm = &snapshot->warm;
	const char *name = icsk->icsk_ca_ops->name;

	if (strncmp(name, snapshot->congestion, SKOFF_CA_NAME) || warm->ca_hz != HZ)
		return;
	if (!strcmp(name, "cubic"))
		memcpy(icsk->icsk_ca_priv, warm->ca_private, sizeof(struct cubic));
	else if (!strcmp(name, "bbr") && !(((const struct bbr *)warm->ca_private)->bits[0] & 4))
		memcpy(icsk->icsk_ca_priv, warm->ca_private, sizeof(icsk->icsk_ca_priv));
	else
		return;
	skoff_shift_congestion(sk, tcp_jiffies32 - warm->ca_jiffies, clock_us() - warm->ca_clock_us);
}

/* On an established socket whose congestion control has begun. Under the socket lock. */
void skoff_import_warm(struct sock *sk, const struct skoff_snapshot *snapshot)
{
	const struct skoff_warm *warm = &snapshot->warm;

	import_rtt(sk, warm);
	import_window(sk, warm);
	expand_send_buffer(sk);
	import_rate(sk, warm);
	import_receiver(sk, warm);
	import_private(sk, snapshot);
}
