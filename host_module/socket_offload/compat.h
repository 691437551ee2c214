/* SPDX-License-Identifier: GPL-2.0-only */
/* The only place that knows what differs between kernel versions. */
#ifndef _SKOFF_COMPAT_H
#define _SKOFF_COMPAT_H

#include <linux/version.h>
#include <net/tcp.h>

#define SKOFF_KERNEL	LINUX_VERSION_CODE

/* 6.7 has microsecond timestamps, per socket. */
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 7, 0)
static inline bool skoff_usec_ts(const struct tcp_sock *tp)
{
	return tp->tcp_usec_ts;
}

static inline bool skoff_set_usec_ts(struct tcp_sock *tp, bool usec)
{
	tp->tcp_usec_ts = usec;
	return true;
}

static inline u32 skoff_clock_ts(const struct tcp_sock *tp)
{
	return tcp_clock_ts(tp->tcp_usec_ts);
}
#else
static inline bool skoff_usec_ts(const struct tcp_sock *tp)
{
	return false;
}

static inline bool skoff_set_usec_ts(struct tcp_sock *tp, bool usec)
{
	return !usec;
}

static inline u32 skoff_clock_ts(const struct tcp_sock *tp)
{
	return tcp_time_stamp_raw();
}
#endif

/* A difference of two skoff_clock_ts() in microseconds. */
static inline u64 skoff_ts_to_us(const struct tcp_sock *tp, u32 difference)
{
	return skoff_usec_ts(tp) ? difference : (u64)difference * USEC_PER_MSEC;
}

/* A key of RFC 2385 or (6.7) RFC 5925 that cannot be moved. */
static inline bool skoff_is_signed(const struct tcp_sock *tp)
{
#ifdef CONFIG_TCP_MD5SIG
	if (rcu_access_pointer(tp->md5sig_info))
		return true;
#endif
#ifdef CONFIG_TCP_AO
	if (rcu_access_pointer(tp->ao_info))
		return true;
#endif
	return false;
}

#endif
