// SPDX-License-Identifier: GPL-2.0-only
/* Class queues with strict priority, and a fixed pool of threads that serve them. */
#include <linux/kthread.h>
#include <linux/module.h>
#include <linux/sched.h>
#include <linux/slab.h>
#include <linux/wait.h>
#include "omss.h"

static unsigned int workers;
module_param(workers, uint, 0444);
MODULE_PARM_DESC(workers, "threads that do the work (one per online CPU)");

static struct task_struct **threads;

static struct {
	spinlock_t lock;		/* all below */
	struct list_head tasks[OMSS_CLASSES];
	unsigned long ready;		/* bit n: tasks[n] is not empty */
	wait_queue_head_t idle;		/* workers */
	wait_queue_head_t done;		/* omss_task_cancel() */
} queues;

unsigned int omss_workers(void)
{
	return workers;
}

void omss_task_init(struct omss_task *task, unsigned int service_class,
		    bool (*run)(struct omss_task *task, struct omss_batch *batch))
{
	INIT_LIST_HEAD(&task->node);
	task->run = run;
	task->service_class = service_class;
}

static void insert(struct omss_task *task)
{
	lockdep_assert_held(&queues.lock);
	task->queued = true;
	list_add_tail(&task->node, &queues.tasks[task->service_class]);
	__set_bit(task->service_class, &queues.ready);
}

static void withdraw(struct omss_task *task)
{
	lockdep_assert_held(&queues.lock);
	task->queued = false;
	list_del_init(&task->node);
	if (list_empty(&queues.tasks[task->service_class]))
		__clear_bit(task->service_class, &queues.ready);
}

/* From any context. A task that runs already runs once more. */
void omss_task_queue(struct omss_task *task)
{
	unsigned long flags;
	bool wake = false;

	spin_lock_irqsave(&queues.lock, flags);
	if (task->running) {
		task->again = true;
	} else if (!task->dead && !task->queued) {
		insert(task);
		wake = true;
	}
	spin_unlock_irqrestore(&queues.lock, flags);
	if (wake)
		wake_up(&queues.idle);
}

static bool stopped(struct omss_task *task)
{
	bool running;

	spin_lock_irq(&queues.lock);
	running = task->running;
	spin_unlock_irq(&queues.lock);
	return !running;
}

/* The task does not run any more, nor ever again. Not from a task. */
void omss_task_cancel(struct omss_task *task)
{
	spin_lock_irq(&queues.lock);
	task->dead = true;
	if (task->queued)
		withdraw(task);
	spin_unlock_irq(&queues.lock);
	wait_event(queues.done, stopped(task));
}

static struct omss_task *take(void)
{
	struct omss_task *task = NULL;
	unsigned int first;

	spin_lock_irq(&queues.lock);
	if (queues.ready) {
		first = __fls(queues.ready);
		task = list_first_entry(&queues.tasks[first], struct omss_task, node);
		withdraw(task);
		task->running = true;
		task->again = false;
	}
	spin_unlock_irq(&queues.lock);
	return task;
}

/* Who waits in omss_task_cancel() may free the task as soon as the lock is gone. */
static void finish(struct omss_task *task, bool more)
{
	bool dead;

	spin_lock_irq(&queues.lock);
	task->running = false;
	dead = task->dead;
	if (!dead && (more || task->again))
		insert(task);
	spin_unlock_irq(&queues.lock);
	if (dead)
		wake_up_all(&queues.done);
}

static int work(void *argument)
{
	struct omss_batch *batch = argument;
	struct omss_task *task;

	while (!kthread_should_stop()) {
		wait_event_idle_exclusive(queues.idle,
					  READ_ONCE(queues.ready) || kthread_should_stop());
		while ((task = take())) {
			finish(task, task->run(task, batch));
			cond_resched();
		}
	}
	kfree(batch);
	return 0;
}

static struct task_struct *start(unsigned int number)
{
	struct omss_batch *batch = kzalloc(sizeof(*batch), GFP_KERNEL);
	struct task_struct *thread;

	if (!batch)
		return ERR_PTR(-ENOMEM);
	thread = kthread_create(work, batch, "omss/%u", number);
	if (IS_ERR(thread))
		kfree(batch);
	else
		wake_up_process(thread);
	return thread;
}

int omss_schedule_start(void)
{
	unsigned int number, count;
	int err;

	spin_lock_init(&queues.lock);
	init_waitqueue_head(&queues.idle);
	init_waitqueue_head(&queues.done);
	for (number = 0; number < OMSS_CLASSES; number++)
		INIT_LIST_HEAD(&queues.tasks[number]);
	count = clamp_t(unsigned int, workers ?: num_online_cpus(), 1, 1024);
	workers = 0;
	threads = kcalloc(count, sizeof(*threads), GFP_KERNEL);
	if (!threads)
		return -ENOMEM;
	for (; workers < count; workers++) {
		threads[workers] = start(workers);
		if (IS_ERR(threads[workers])) {
			err = PTR_ERR(threads[workers]);
			omss_schedule_stop();
			return err;
		}
	}
	return 0;
}

void omss_schedule_stop(void)
{
	while (workers)
		kthread_stop(threads[--workers]);
	kfree(threads);
}
